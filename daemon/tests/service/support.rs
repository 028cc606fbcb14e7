//! Places, tools and waiting.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use tempfile::TempDir;

pub(crate) const FMALLOCD: &str = env!("CARGO_BIN_EXE_fmallocd");
pub(crate) const FMALLOCCTL: &str = env!("CARGO_BIN_EXE_fmallocctl");

/// A directory on a disk that every user can look into; removed at the end.
pub(crate) fn place() -> TempDir {
    let place = tempfile::Builder::new().prefix("fmalloc-test-").tempdir_in("/var/tmp").unwrap();
    std::fs::set_permissions(place.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    place
}

/// The project's root.
pub(crate) fn project() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Whether a program is installed. Where tests must not be skipped it has to be.
pub(crate) fn has(program: &str, package: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap();
    let found = std::env::split_paths(&path).any(|dir| dir.join(program).is_file());
    may_skip(found, &format!("{program}, of Debian's package {package}"))
}

pub(crate) fn is_root() -> bool {
    may_skip(nix::unistd::geteuid().is_root(), "root")
}

fn may_skip(found: bool, what: &str) -> bool {
    if !found {
        assert!(std::env::var_os("CI").is_none(), "this test needs {what}");
        eprintln!("skipped: needs {what}");
    }
    found
}

/// Runs it to its end, which must be a good one.
pub(crate) fn succeed(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
    output
}

pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(20), "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
