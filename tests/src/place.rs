//! Where things are: binaries that cargo has built, temporary files; and whether tests can page memory here.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use tempfile::TempDir;

const PREFIX: &str = "fmalloc-test-";
/// On a disk, and open to every user.
const TEMPORARY: &str = "/var/tmp";

/// A binary of this workspace, from the directory that this program was built into.
///
/// # Panics
/// If it was not built.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    let own = std::env::current_exe().expect("the path of this program");
    let dir = own.parent().expect("a directory");
    let dir = if dir.ends_with("deps") { dir.parent().expect("a directory") } else { dir };
    let path = dir.join(name);
    assert!(path.is_file(), "{} is missing: run `cargo build --workspace` first", path.display());
    path
}

/// Whether full userfaultfd is to be had. Says what is missing if not; where all tests must run (CI is set) it panics.
///
/// # Panics
/// See above.
#[must_use]
pub fn can_page() -> bool {
    let Some(missing) = missing() else { return true };
    assert!(std::env::var_os("CI").is_none(), "this test cannot run without {missing}");
    eprintln!("skipped: this test needs {missing}");
    false
}

fn missing() -> Option<&'static str> {
    if !nix::unistd::geteuid().is_root() {
        return Some("root");
    }
    open("/dev/userfaultfd", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())
        .is_err()
        .then_some("access to /dev/userfaultfd")
}

/// A directory that every user can read, removed with the value. Those of test runs that were killed go as well.
///
/// # Panics
/// If it cannot be made.
#[must_use]
pub fn directory() -> TempDir {
    remove_leftovers();
    let prefix = format!("{PREFIX}{}-", std::process::id());
    let dir = tempfile::Builder::new().prefix(&prefix).tempdir_in(TEMPORARY).expect("a temporary directory");
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("its mode");
    dir
}

fn remove_leftovers() {
    for entry in fs::read_dir(TEMPORARY).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner =
            name.to_str().and_then(|name| name.strip_prefix(PREFIX)).and_then(|rest| rest.split('-').next());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Copies a binary to where every user can run it: what cargo built may lie in somebody's home.
///
/// # Panics
/// If it cannot be copied.
pub fn share(name: &str, dir: &Path) -> PathBuf {
    let copy = dir.join(name);
    if !copy.exists() {
        fs::copy(binary(name), &copy).expect("a copy of a binary");
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).expect("its mode");
    }
    copy
}
