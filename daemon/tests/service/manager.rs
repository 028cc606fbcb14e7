//! What passes between fmallocd and a service manager.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use nix::unistd::Pid;
use tempfile::TempDir;

use super::support::{FMALLOCCTL, FMALLOCD, has, place, wait_until};

/// A daemon with a configuration file, and the end of its conversation that a service manager has.
struct Managed {
    place: TempDir,
    notify: UnixDatagram,
    child: Option<Child>,
}

impl Managed {
    fn new() -> Self {
        let place = place();
        let notify = UnixDatagram::bind(place.path().join("notify")).unwrap();
        notify.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let managed = Self { place, notify, child: None };
        managed.configure("");
        managed
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    /// Writes the configuration file, with these lines besides the necessary.
    fn configure(&self, lines: &str) {
        let path = |name| toml::Value::String(self.path(name).display().to_string());
        let text = format!(
            "ram = '256M'\nswap_size = '16M'\nswap = {}\nsocket = {}\n{lines}",
            path("swap"),
            path("socket")
        );
        fs::write(self.path("config"), text).unwrap();
    }

    /// The command, started by `program` and its arguments if there is one.
    fn command(&self, program: &[&str]) -> Command {
        let mut words = [program, &[FMALLOCD]].concat();
        let mut command = Command::new(words.remove(0));
        command.args(words).arg("--config").arg(self.path("config"));
        command.env("NOTIFY_SOCKET", self.path("notify"));
        command.stderr(File::options().create(true).append(true).open(self.path("log")).unwrap());
        command
    }

    fn start(&mut self, mut command: Command) {
        self.child = Some(command.spawn().unwrap());
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap()
    }

    fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid().cast_signed()), signal).unwrap();
    }

    /// What the daemon says next, but for signs of life.
    fn hear(&self) -> String {
        loop {
            let said = self.hear_anything();
            if said != "WATCHDOG=1\n" {
                return said;
            }
        }
    }

    fn hear_anything(&self) -> String {
        let mut bytes = [0; 4096];
        let length = self.notify.recv(&mut bytes).unwrap_or_else(|error| panic!("{error}: {}", self.log()));
        String::from_utf8(bytes[..length].to_vec()).unwrap()
    }

    fn end(&mut self) -> i32 {
        let mut child = self.child.take().unwrap();
        wait_until("the daemon ends", || child.try_wait().unwrap().is_some());
        child.wait().unwrap().code().unwrap()
    }

    fn answers(&self, socket: &Path) -> bool {
        Command::new(FMALLOCCTL).arg("--socket").arg(socket).arg("status").output().unwrap().status.success()
    }
}

impl Drop for Managed {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[test]
fn readiness_and_end_are_told() {
    let mut managed = Managed::new();
    managed.start(managed.command(&[]));
    assert!(managed.hear().starts_with("READY=1\n"));
    assert!(managed.answers(&managed.path("socket")));
    managed.signal(Signal::SIGTERM);
    assert!(managed.hear().starts_with("STOPPING=1\n"));
    assert_eq!(managed.end(), 0);
    assert!(!managed.path("socket").exists());
}

#[test]
fn signs_of_life_come_in_time_if_they_are_wanted() {
    let mut managed = Managed::new();
    let limit = Duration::from_millis(900);
    let mut command = managed.command(&[]);
    command.env("WATCHDOG_USEC", limit.as_micros().to_string());
    managed.start(command);
    while managed.hear_anything() != "WATCHDOG=1\n" {}
    for _ in 0..4 {
        let start = Instant::now();
        assert_eq!(managed.hear_anything(), "WATCHDOG=1\n");
        assert!(start.elapsed() < limit, "{:?}", start.elapsed());
    }
}

#[test]
fn no_signs_of_life_unless_they_are_wanted() {
    let mut managed = Managed::new();
    let mut command = managed.command(&[]);
    // Meant for another process.
    command.env("WATCHDOG_USEC", "1000").env("WATCHDOG_PID", "1");
    managed.start(command);
    assert!(managed.hear_anything().starts_with("READY=1\n"));
    managed.notify.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert!(managed.notify.recv(&mut [0; 64]).is_err());
}

#[test]
fn reload_changes_what_can_change_and_names_the_rest() {
    let mut managed = Managed::new();
    managed.start(managed.command(&[]));
    assert!(managed.hear().starts_with("READY=1\n"));

    managed
        .configure("max_clients = 7\nallow_uid = ['root', 65534]\nlog_level = 'debug'\nno_poison = true\n");
    managed.signal(Signal::SIGHUP);
    assert!(managed.hear().starts_with("RELOADING=1\nMONOTONIC_USEC="));
    assert!(managed.hear().starts_with("READY=1\n"));
    let log = managed.log();
    assert!(log.contains("changed: allow_uid, max_clients, log_level"), "{log}");
    assert!(log.contains("restart of fmallocd: no_poison"), "{log}");

    // Nothing is reported twice.
    managed.signal(Signal::SIGHUP);
    assert!(managed.hear().starts_with("RELOADING=1\n"));
    assert!(managed.hear().starts_with("READY=1\n"));
    assert!(managed.log().contains("changed: nothing"), "{}", managed.log());
}

#[test]
fn reload_of_a_wrong_configuration_changes_nothing() {
    let mut managed = Managed::new();
    managed.start(managed.command(&[]));
    assert!(managed.hear().starts_with("READY=1\n"));
    managed.configure("max_clients = 'many'\n");
    managed.signal(Signal::SIGHUP);
    assert!(managed.hear().starts_with("RELOADING=1\n"));
    assert!(managed.hear().starts_with("READY=1\n"));
    let log = managed.log();
    assert!(log.contains("the configuration stays as it was") && log.contains("line 5"), "{log}");
    assert!(managed.answers(&managed.path("socket")));
}

#[test]
fn value_that_makes_no_sense_is_named_with_its_line() {
    let managed = Managed::new();
    managed.configure("# a comment\nmax_clients = 0\n");
    let output = managed.command(&[]).arg("--check").stderr(std::process::Stdio::piped()).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("config: line 6: max_clients: 0 would let nobody in"), "{said}");
}

#[test]
fn reload_admits_and_expels_users() {
    if !super::support::is_root() {
        return;
    }
    let mut managed = Managed::new();
    managed.configure("socket_mode = '0666'\n");
    managed.start(managed.command(&[]));
    assert!(managed.hear().starts_with("READY=1\n"));
    // The build directory may be closed to other users.
    let copy = managed.path("fmallocctl");
    fs::copy(FMALLOCCTL, &copy).unwrap();
    let admitted = || {
        let mut command = Command::new(&copy);
        command.arg("--socket").arg(managed.path("socket")).arg("status").uid(65534).gid(65534);
        command.output().unwrap().status.success()
    };
    assert!(!admitted());
    for (lines, expected) in [("allow_uid = ['nobody']\n", true), ("", false)] {
        managed.configure(&format!("socket_mode = '0666'\n{lines}"));
        managed.signal(Signal::SIGHUP);
        managed.hear();
        managed.hear();
        assert_eq!(admitted(), expected, "{}", managed.log());
    }
}

#[test]
fn socket_activation_serves_the_socket_that_was_made_in_advance() {
    if !has("systemd-socket-activate", "systemd") {
        return;
    }
    let mut managed = Managed::new();
    let early = managed.path("early");
    let notify = format!("NOTIFY_SOCKET={}", managed.path("notify").display());
    let listen = early.to_str().unwrap().to_owned();
    let activate = ["systemd-socket-activate", "--seqpacket", "--listen", &listen, "--setenv", &notify];
    managed.start(managed.command(&activate));
    // The first connection starts the daemon. The file is there a moment before anybody listens.
    wait_until("the socket takes connections", || managed.answers(&early));
    assert!(managed.hear().starts_with("READY=1\n"));
    assert!(!managed.path("socket").exists());
    let status =
        Command::new(FMALLOCCTL).arg("--socket").arg(&early).args(["status", "--json"]).output().unwrap();
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!(status["socket"], early.to_str().unwrap());
    managed.signal(Signal::SIGTERM);
    assert!(managed.hear().starts_with("STOPPING=1\n"));
    assert_eq!(managed.end(), 0);
    // It is not the daemon's to remove.
    assert!(early.exists());
}

/// Has the command started with these sockets as descriptors from 3 on.
fn pass(command: &mut Command, sockets: Vec<OwnedFd>) {
    // SAFETY: between fork and exec only dup2 is called.
    unsafe {
        command.pre_exec(move || {
            for (number, socket) in (3..).zip(&sockets) {
                nix::errno::Errno::result(libc::dup2(socket.as_raw_fd(), number))?;
            }
            Ok(())
        });
    }
}

/// Another descriptor of it, out of the way of the numbers that are passed.
fn out_of_the_way(socket: impl AsFd) -> OwnedFd {
    use std::os::fd::FromRawFd;
    let fd = nix::fcntl::fcntl(socket, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(100)).unwrap();
    // SAFETY: the descriptor was just made for us.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn seqpacket(path: &Path, listening: bool) -> OwnedFd {
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(fd.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    if listening {
        listen(&fd, Backlog::new(8).unwrap()).unwrap();
    }
    out_of_the_way(fd)
}

#[test]
fn wrong_sockets_are_refused_with_the_remedy() {
    let stream = |path: &Path| out_of_the_way(UnixListener::bind(path).unwrap());
    type Make<'a> = &'a dyn Fn(&Path) -> Vec<OwnedFd>;
    let cases: [(&str, Make<'_>); 3] = [
        ("ListenSequentialPacket=/run/fmalloc", &|dir| vec![stream(&dir.join("a"))]),
        ("ListenSequentialPacket=/run/fmalloc", &|dir| vec![seqpacket(&dir.join("a"), false)]),
        ("leave a single", &|dir| vec![seqpacket(&dir.join("a"), true), seqpacket(&dir.join("b"), true)]),
    ];
    for (remedy, make) in cases {
        let mut managed = Managed::new();
        // LISTEN_PID must be the daemon's own: the shell becomes it.
        let mut command = managed.command(&["sh", "-c", "LISTEN_PID=$$ exec \"$0\" \"$@\""]);
        let sockets = make(managed.place.path());
        command.env("LISTEN_FDS", sockets.len().to_string());
        pass(&mut command, sockets);
        managed.start(command);
        assert_eq!(managed.end(), 1);
        assert!(managed.log().contains(remedy), "{}", managed.log());
        assert!(!managed.path("swap").exists());
    }
}

#[test]
fn sockets_meant_for_another_process_are_left_alone() {
    let mut managed = Managed::new();
    let mut command = managed.command(&[]);
    command.env("LISTEN_PID", "1").env("LISTEN_FDS", "1");
    managed.start(command);
    assert!(managed.hear().starts_with("READY=1\n"));
    assert!(managed.answers(&managed.path("socket")));
}

#[test]
fn log_lines_for_the_journal_begin_with_their_priority() {
    let mut managed = Managed::new();
    let mut command = managed.command(&[]);
    let log = fs::metadata(managed.path("log")).unwrap();
    command.env("JOURNAL_STREAM", format!("{}:{}", log.dev(), log.ino()));
    managed.start(command);
    assert!(managed.hear().starts_with("READY=1\n"));
    wait_until("it says so", || managed.log().contains("<6>ready\n"));
    assert!(managed.log().lines().all(|line| line.starts_with('<')), "{}", managed.log());
}

#[test]
fn socket_is_in_the_directory_that_the_service_manager_made() {
    let mut managed = Managed::new();
    let config = fs::read_to_string(managed.path("config")).unwrap();
    let without: Vec<_> = config.lines().filter(|line| !line.starts_with("socket")).collect();
    fs::write(managed.path("config"), without.join("\n")).unwrap();
    let mut command = managed.command(&[]);
    command.env("RUNTIME_DIRECTORY", managed.place.path());
    managed.start(command);
    assert!(managed.hear().starts_with("READY=1\n"));
    assert!(managed.answers(&managed.path("fmallocd.sock")));
}

#[test]
fn memory_is_locked_where_that_is_permitted() {
    let mut managed = Managed::new();
    managed.start(managed.command(&[]));
    assert!(managed.hear().starts_with("READY=1\n"));
    let status = fs::read_to_string(format!("/proc/{}/status", managed.pid())).unwrap();
    let locked = status.lines().find_map(|line| line.strip_prefix("VmLck:")).unwrap().trim();
    let warned = managed.log().contains("LimitMEMLOCK=infinity");
    assert_eq!(locked == "0 kB", warned, "{locked}: {}", managed.log());
}

#[test]
fn private_daemon_says_nothing_to_the_application_s_service_manager() {
    let managed = Managed::new();
    let (ours, theirs) = fmalloc_proto::transport::pair().unwrap();
    let mut command = Command::new(FMALLOCD);
    command.args([
        "--private",
        "--private-fd",
        "3",
        "--swap-size",
        "16M",
        "--ram",
        "16M",
        "--swap-dir",
        "/var/tmp",
    ]);
    command.env("NOTIFY_SOCKET", managed.path("notify")).env("WATCHDOG_USEC", "1000");
    pass(&mut command, vec![theirs]);
    let mut child = command.spawn().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    drop(command);
    drop(ours);
    assert!(child.wait().unwrap().success());
    managed.notify.set_nonblocking(true).unwrap();
    assert!(managed.notify.recv(&mut [0; 64]).is_err());
}
