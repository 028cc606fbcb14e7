//! The two ways to have memory paged, each tried as a program would: the service, and a private daemon.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use fmalloc_proto::messages::{Empty, ErrorCode, Reply, Request, Status};
use fmalloc_proto::size::Size;
use fmalloc_proto::transport;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::unistd::Group;

use super::super::link::Link;
use super::super::places::find_daemon;
use super::report::{Report, State, as_root};
use super::rights::{self, GROUP};
use super::talk::{self, Refusal};
use super::uffd::Access;
use crate::config::{SYSTEM_SOCKET, user_socket};

/// How long a private daemon may take to end when its client has gone.
const ENDING: Duration = Duration::from_secs(5);

/// What the service gave.
#[derive(Debug, Default)]
pub(super) struct Service {
    /// It granted a budget.
    pub(super) opened: bool,
    /// `/dev/userfaultfd` as it passes it to clients.
    pub(super) device: Option<OwnedFd>,
    pub(super) status: Option<Status>,
}

/// Asks the service for a budget. `socket` is the one that was named, if any.
pub(super) fn service(report: &mut Report, socket: Option<&Path>) -> Service {
    report.area("service");
    let places: Vec<PathBuf> = match socket {
        Some(path) => vec![path.to_owned()],
        None => std::iter::once(PathBuf::from(SYSTEM_SOCKET)).chain(user_socket()).collect(),
    };
    let mut failures = Vec::new();
    for path in &places {
        match transport::connect(path) {
            Ok(connected) => {
                report.ok("socket", format!("{} answers", path.display()));
                return converse(report, path, &connected);
            }
            Err(errno) => failures.push((path, errno)),
        }
    }
    // The one that exists says more about what is wrong than one that does not.
    let (path, errno) = failures.iter().find(|(_, errno)| *errno != Errno::ENOENT).unwrap_or(&failures[0]);
    let (found, mend) = match errno {
        Errno::EACCES => ("this user may not connect".to_owned(), rights::join_group()),
        Errno::ENOENT => ("no service: there is no socket".to_owned(), start_service()),
        Errno::ECONNREFUSED => ("the service that was there has ended".to_owned(), start_service()),
        other => (other.desc().to_owned(), start_service()),
    };
    let cost = "programs that use Pager::connect do not run; private daemons need no service";
    report.lacks("socket", State::Blocks, format!("{}: {found}", path.display()), cost, mend);
    Service::default()
}

/// The command that starts a service here.
fn start_service() -> String {
    if has_unit() {
        return as_root("systemctl enable --now fmallocd.socket");
    }
    let program = find_daemon().unwrap_or_else(|| "fmallocd".into());
    let allow = match nix::unistd::geteuid() {
        root if root.is_root() => String::new(),
        uid => format!(" --allow-uid {uid}"),
    };
    as_root(&format!("{}{allow}", program.display()))
}

/// Whether systemd runs here and knows the service.
fn has_unit() -> bool {
    let places = ["/etc/systemd", "/usr/local/lib/systemd", "/usr/lib/systemd", "/lib/systemd"];
    Path::new("/run/systemd/system").is_dir()
        && places.iter().any(|place| Path::new(place).join("system/fmallocd.service").exists())
}

fn converse(report: &mut Report, path: &Path, socket: &OwnedFd) -> Service {
    let mut service = Service::default();
    match talk::ask_for_budget(socket) {
        Ok(grant) => {
            report.ok("admission", "this user is admitted and granted a budget");
            service.opened = true;
            service.device = grant.device;
        }
        Err(refusal) => {
            refused(report, &refusal);
            // It would say no more than the same again.
            if matches!(refusal.code, None | Some(ErrorCode::Denied)) {
                return service;
            }
        }
    }
    match Link::open(Some(path)).and_then(|mut link| link.ask(&Request::Status(Empty {}))) {
        Ok(Reply::Status(status)) => {
            describe(report, &status);
            service.status = Some(*status);
        }
        Ok(other) => report.note("daemon", format!("answered something else: {other:?}")),
        Err(error) => report.note("daemon", error.to_string()),
    }
    service
}

fn describe(report: &mut Report, status: &Status) {
    const OWN: &str = env!("CARGO_PKG_VERSION");
    let found = format!("version {}, process {}, {} clients", status.version, status.pid, status.clients);
    if status.version == OWN {
        report.ok("daemon", found);
    } else {
        let cost = format!("this fmallocctl is of version {OWN}: what it says may not hold");
        report.lacks("daemon", State::Costs, found, cost, as_root("systemctl restart fmallocd"));
    }
    let (free, pool) = (status.pool_bytes.saturating_sub(status.pool_granted_bytes), status.pool_bytes);
    report.ok("RAM pool", format!("{} of {} left to grant", Size(free), Size(pool)));
    let left = status.swap_bytes.saturating_sub(status.swap_claimed_bytes);
    let name = if status.swap_path.is_empty() { "(no name)" } else { &status.swap_path };
    let found = format!("{name}, {} of {} left to claim", Size(left), Size(status.swap_bytes));
    if left * 20 < status.swap_bytes {
        let cost = "larger regions are refused";
        report.lacks(
            "swap",
            State::Costs,
            found,
            cost,
            "set swap_size in /etc/fmalloc/fmallocd.toml, and restart fmallocd",
        );
    } else {
        report.ok("swap", found);
    }
    if !status.io_uring {
        report.note("service I/O", "without io_uring: one request at a time for each client");
    }
    if !status.direct_io {
        report.note("service I/O", "not direct: swap fills the page cache");
    }
}

fn refused(report: &mut Report, refusal: &Refusal) {
    let mend = match refusal.code {
        Some(ErrorCode::Denied) => admit(),
        Some(ErrorCode::PoolFull) => {
            "fmallocctl clients, and lower one: fmallocctl limit CLIENT SIZE".to_owned()
        }
        Some(ErrorCode::Limit) => {
            "raise max_clients or max_clients_per_uid in /etc/fmalloc/fmallocd.toml".to_owned()
        }
        Some(ErrorCode::Draining) => as_root("systemctl start fmallocd") + "   # once it has ended",
        _ => as_root("journalctl -u fmallocd -e"),
    };
    let cost = "the service pages no programs of this user at present";
    report.lacks("admission", State::Blocks, refusal.text.clone(), cost, mend);
}

/// How the service comes to admit this user.
fn admit() -> String {
    if !has_unit() {
        return format!("start it with --allow-uid {}", nix::unistd::geteuid());
    }
    let allow = format!(
        "set allow_gid = [\"{GROUP}\"] in /etc/fmalloc/fmallocd.toml, {}",
        as_root("systemctl reload fmallocd")
    );
    match Group::from_name(GROUP) {
        Ok(Some(group)) if rights::in_group(group.gid) => allow,
        _ => format!("{allow} && {}", rights::join_group()),
    }
}

/// Whether what the service gave is enough for a full userfaultfd.
pub(super) fn judge_service(report: &mut Report, opened: bool, access: &Access) {
    if !opened {
        return;
    }
    if access.passed.is_some() && access.make().is_ok() {
        report.ok("userfaultfd", "passed by the service: system calls on swapped memory work");
        report.service = true;
    } else if access.own() {
        report.note("userfaultfd", "not passed by the service; this user can make one");
        report.service = true;
    } else {
        let mend = format!(
            "{} && {}",
            as_root("chgrp fmalloc /dev/userfaultfd"),
            as_root("chmod 0660 /dev/userfaultfd")
        );
        report.lacks(
            "userfaultfd",
            State::Blocks,
            "not passed by the service, which cannot open /dev/userfaultfd itself",
            "programs are paged only if they accept user_mode_only, in which system calls on swapped memory fail",
            mend,
        );
    }
}

/// Starts a private daemon and asks it for a budget.
pub(super) fn private(report: &mut Report, swap_dir: &Path, access: &Access) {
    report.area("private daemon");
    let Some(program) = find_daemon() else {
        report.lacks(
            "fmallocd",
            State::Blocks,
            "not found beside this program, in PATH or in /usr/libexec/fmalloc",
            "no private daemons (Pager::private)",
            "install it, or name it: export FMALLOC_DAEMON=/path/to/fmallocd",
        );
        return;
    };
    let start = Instant::now();
    let outcome = start_private(&program, swap_dir).and_then(|(mut child, socket)| {
        let granted = talk::ask_for_budget(&socket).map(drop);
        let time = start.elapsed();
        drop(socket);
        let said = end(&mut child);
        granted.map(|()| time).map_err(|refusal| if said.is_empty() { refusal.text } else { said })
    });
    match outcome {
        Ok(time) => {
            let ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
            report.figure("private_start_ms", ms);
            report.ok("fmallocd", format!("{}, ready after {ms} ms", program.display()));
            report.private = access.own();
            report.private_user_mode = access.own() || access.user_mode.is_ok();
        }
        Err(error) => {
            let found = format!("{} does not start: {error}", program.display());
            let cost = "no private daemons (Pager::private)";
            let mend =
                "name a directory on a disk: --swap-dir or FMALLOC_SWAP_DIR; another program: FMALLOC_DAEMON";
            report.lacks("fmallocd", State::Blocks, found, cost, mend);
        }
    }
}

fn start_private(program: &Path, swap_dir: &Path) -> Result<(Child, OwnedFd), String> {
    let (ours, theirs) = transport::pair().map_err(|errno| errno.to_string())?;
    let number = theirs.as_raw_fd();
    let mut command = Command::new(program);
    command.args([
        "--private",
        "--private-fd",
        &number.to_string(),
        "--ram",
        "16M",
        "--swap-size",
        "16M",
        "--swap-dir",
    ]);
    command.arg(swap_dir).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    // SAFETY: between fork and exec only fcntl is called, on a descriptor that is open in the child as it is here.
    unsafe {
        command.pre_exec(move || {
            let fd = std::os::fd::BorrowedFd::borrow_raw(number);
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
            Ok(())
        });
    }
    let child = command.spawn().map_err(|error| error.to_string())?;
    Ok((child, ours))
}

/// Waits until the daemon has ended, and gives what it said if that was not in order.
fn end(child: &mut Child) -> String {
    let start = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return String::new(),
            Ok(Some(_)) | Err(_) => break,
            Ok(None) if start.elapsed() > ENDING => {
                let _ = child.kill();
                let _ = child.wait();
                return "it does not end when its client has gone".to_owned();
            }
            Ok(None) => std::thread::sleep(Duration::from_millis(2)),
        }
    }
    let said = child.stderr.take().map(std::io::read_to_string).and_then(Result::ok).unwrap_or_default();
    said.lines().last().unwrap_or("it ended without a word").to_owned()
}
