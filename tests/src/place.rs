//! Where things are: binaries that cargo has built, temporary files; and whether tests can page memory here.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use fmalloc_proto::switches::{DISABLE, Disabled};
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use tempfile::TempDir;

/// Says that daemons and clients run without privileges, and without a userfaultfd for system calls.
pub const USER_MODE: &str = "FMALLOC_TEST_USER_MODE";
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

/// What FMALLOC_DISABLE switches off for the daemons and clients of this run, as on an older kernel.
///
/// # Panics
/// If it names what nobody knows.
#[must_use]
pub fn disabled() -> Disabled {
    std::env::var(DISABLE).unwrap_or_default().parse().expect("words of FMALLOC_DISABLE")
}

/// Whether pages can be moved out of regions. What needs that is skipped without it: DMA into regions is not safe then.
#[must_use]
pub fn can_move() -> bool {
    let can = !disabled().move_pages;
    if !can {
        eprintln!("skipped: not promised without UFFDIO_MOVE");
    }
    can
}

/// Whether daemons and clients of this run are nobody's, with a userfaultfd that does not serve system calls
/// (FMALLOC_TEST_USER_MODE).
#[must_use]
pub fn is_user_mode() -> bool {
    std::env::var_os(USER_MODE).is_some()
}

/// Where swap files are, if not in the daemon's directory (FMALLOC_TEST_SWAP_DIR): in RAM, say, where there is no
/// O_DIRECT. Removed with the value.
///
/// # Panics
/// If it cannot be made.
#[must_use]
pub fn swap_directory() -> Option<TempDir> {
    let parent = std::env::var_os("FMALLOC_TEST_SWAP_DIR")?;
    let dir = tempfile::Builder::new().prefix(PREFIX).tempdir_in(parent).expect("a directory for swap");
    Some(dir)
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
