//! Starting a private daemon: the application must not notice, and the daemon must inherit nothing.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test says so by ending")]

use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use fmalloc_client::{Error, Pager, PrivateOptions};

/// Plays the daemon as far as it matters here: writes down what it was given, and ends.
const SCRIPT: &str = r#"#!/bin/sh
echo "args: $*"
echo "preload: ${LD_PRELOAD-none}"
echo "cwd: $(pwd)"
cat /proc/self/status | grep -E '^Sig(Blk|Ign)'
ls -l /proc/$$/fd | sed 's/.* \([0-9]* -> .*\)/fd \1/'
echo "ids: $(cut -d' ' -f4-6 /proc/$$/stat)" pid $$
"#;

struct Dir(PathBuf);

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn program(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o755).open(&path).unwrap();
    file.write_all(text.as_bytes()).unwrap();
    path
}

/// One test, since it sets the environment and looks at all children of this process.
#[test]
fn a_private_daemon_is_detached_and_inherits_nothing() {
    let dir = Dir(std::env::temp_dir().join(format!("fmalloc-private-{}", std::process::id())));
    std::fs::create_dir_all(&dir.0).unwrap();
    let log = dir.0.join("log");
    // SAFETY: the test harness runs this one test only, and nothing else reads the environment meanwhile.
    unsafe {
        std::env::set_var("FMALLOC_DAEMON_LOG", &log);
        std::env::set_var("LD_PRELOAD", "");
    }
    let (reader, _writer) = nix::unistd::pipe().unwrap();
    // SAFETY: makes a descriptor that a child would inherit, as careless programs have them.
    let inheritable = unsafe { libc::dup(reader.as_raw_fd()) };
    assert!(inheritable >= 3);

    let mut options = PrivateOptions::new(8 << 20);
    options.daemon = Some(program(&dir.0, "daemon", SCRIPT));
    options.swap_dir = Some("relative".into());
    options.swap_size = Some(1 << 30);
    options.user_mode_only = true;
    let error = Pager::private(&options).unwrap_err();
    assert!(matches!(&error, Error::Conversation { what } if what.contains("FMALLOC_DAEMON_LOG")), "{error}");

    // SAFETY: asks for any child; there is none that a plain wait can see.
    assert_eq!(unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) }, -1);
    assert_eq!(nix::errno::Errno::last(), nix::errno::Errno::ECHILD);
    // SAFETY: as above, all kinds of children.
    assert_eq!(unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG | libc::__WALL) }, -1);

    let text = || std::fs::read_to_string(&log).unwrap_or_default();
    for _ in 0..1000 {
        if text().contains("ids:") {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let text = text();
    let line = |start: &str| {
        let found = text.lines().find_map(|line| line.strip_prefix(start));
        found.unwrap_or_else(|| panic!("no {start} in {text}")).trim().to_owned()
    };
    let swap_dir = std::env::current_dir().unwrap().join("relative");
    let args = line("args:");
    let (args, number) = args.split_once(" --private-fd ").unwrap();
    assert_eq!(
        args,
        format!(
            "--private --swap-dir {} --ram 8388608 --default-budget 8388608 --swap-size 1073741824 --user-mode-only",
            swap_dir.display()
        )
    );
    assert_eq!(line("preload:"), "none");
    assert_eq!(line("cwd:"), "/");
    assert_eq!(line("SigBlk:"), "0000000000000000");
    assert_eq!(
        line("SigIgn:"),
        "0000000000000000",
        "the Rust runtime ignores SIGPIPE; the daemon starts afresh"
    );
    let fds: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("fd ")).collect();
    assert!(fds.contains(&"0 -> /dev/null"), "{text}");
    assert!(fds.iter().any(|fd| fd.starts_with(&format!("{number} -> socket:"))), "{text}");
    let strangers = fds.iter().filter(|fd| {
        let script = fd.ends_with("/daemon");
        !script && !fd.contains("/dev/null") && !fd.contains("/log") && !fd.contains("socket:")
    });
    assert_eq!(strangers.count(), 0, "{text}");
    assert_eq!(fds.iter().filter(|fd| fd.contains("socket:")).count(), 1, "{text}");
    let ids = line("ids:");
    let (ids, pid) = ids.split_once(" pid ").unwrap();
    let ids: Vec<&str> = ids.split(' ').collect();
    assert_ne!(ids[0], std::process::id().to_string(), "not our child");
    assert_ne!(ids[1], pid, "in a session of its own, and not its leader");
    assert_eq!(ids[1], ids[2]);
    // SAFETY: asks for a number.
    assert_ne!(ids[2], unsafe { libc::getsid(0) }.to_string());

    failures_are_told(&dir.0);
    // SAFETY: ours.
    unsafe { libc::close(inheritable) };
}

fn failures_are_told(dir: &Path) {
    let mut options = PrivateOptions::new(8 << 20);
    options.daemon = Some(dir.join("missing"));
    let error = Pager::private(&options).unwrap_err();
    assert!(matches!(&error, Error::NoDaemonBinary { tried } if tried.len() == 1), "{error}");
    assert!(error.to_string().contains("FMALLOC_DAEMON"), "{error}");

    options.daemon = Some(program(dir, "nonsense", "not a program"));
    let error = Pager::private(&options).unwrap_err();
    assert!(matches!(error, Error::System { errno: libc::ENOEXEC, .. }), "{error}");

    let plain = program(dir, "plain", "");
    std::fs::set_permissions(&plain, std::fs::Permissions::from_mode(0o644)).unwrap();
    // SAFETY: as in the test that calls this.
    unsafe { std::env::set_var("FMALLOC_DAEMON", &plain) };
    options.daemon = None;
    let error = Pager::private(&options).unwrap_err();
    assert!(matches!(&error, Error::NoDaemonBinary { tried } if tried[0].0 == plain), "{error}");
}
