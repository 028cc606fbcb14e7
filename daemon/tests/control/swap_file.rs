//! The swap file on real file systems.

use std::fs::{self, OpenOptions, Permissions};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use fmallocd::swap::SwapFile;
use fmallocd::swap::file::SwapFileError;

use super::support::{MIB, Place, is_root};

const SHM: &str = "/dev/shm";

#[test]
fn new_file_is_private_and_allocated() {
    let place = Place::new();
    let path = place.path("swap");
    let swap = SwapFile::open(&path, Some(8 * MIB + 5)).unwrap();
    let meta = fs::metadata(&path).unwrap();
    assert_eq!(meta.mode() & 0o7777, 0o600);
    assert_eq!((meta.len(), swap.bytes(), swap.max_bytes()), (8 * MIB, 8 * MIB, 8 * MIB));
    assert!(meta.blocks() * 512 >= 8 * MIB);
    assert_eq!(swap.path(), Some(path.as_path()));
    assert!(swap.grow(8 * MIB).is_ok());
    assert_eq!(swap.grow(9 * MIB).unwrap_err().kind(), std::io::ErrorKind::StorageFull);
}

#[test]
fn existing_file_is_reused_and_cut_to_size() {
    let place = Place::new();
    let path = place.path("swap");
    drop(SwapFile::open(&path, Some(8 * MIB)).unwrap());
    let inode = fs::metadata(&path).unwrap().ino();
    for size in [2 * MIB, 16 * MIB] {
        let swap = SwapFile::open(&path, Some(size)).unwrap();
        let meta = fs::metadata(&path).unwrap();
        assert_eq!((meta.ino(), meta.len(), swap.bytes()), (inode, size, size));
    }
}

#[test]
fn file_that_others_can_read_or_own_is_refused() {
    let place = Place::new();
    let path = place.path("swap");
    OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&path).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
    assert!(matches!(SwapFile::open(&path, Some(MIB)), Err(SwapFileError::Exposed { mode: 0o640, .. })));
    if is_root() {
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        std::os::unix::fs::chown(&path, Some(65534), None).unwrap();
        assert!(matches!(SwapFile::open(&path, Some(MIB)), Err(SwapFileError::Exposed { uid: 65534, .. })));
    }
    assert_eq!(fs::metadata(&path).unwrap().len(), 0);
}

#[test]
fn links_and_other_kinds_of_files_are_refused() {
    let place = Place::new();
    let precious = place.path("precious");
    fs::write(&precious, "data").unwrap();
    fs::set_permissions(&precious, Permissions::from_mode(0o600)).unwrap();
    let link = place.path("link");
    symlink(&precious, &link).unwrap();
    assert!(SwapFile::open(&link, Some(MIB)).is_err());
    assert_eq!(fs::read_to_string(&precious).unwrap(), "data");
    let fifo = place.path("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(matches!(SwapFile::open(&fifo, Some(MIB)), Err(SwapFileError::NotAFile(_))));
    assert!(matches!(SwapFile::open(Path::new("/dev/null"), Some(MIB)), Err(SwapFileError::NotAFile(_))));
    assert!(SwapFile::open(&place.path(""), Some(MIB)).is_err());
    assert!(SwapFile::open(&place.path("missing/swap"), Some(MIB)).is_err());
}

#[test]
fn second_user_of_a_file_is_refused_with_the_pid_of_the_first() {
    let place = Place::new();
    let path = place.path("swap");
    let first = SwapFile::open(&path, Some(MIB)).unwrap();
    let error = SwapFile::open(&path, Some(MIB)).unwrap_err();
    assert!(error.to_string().contains(&format!("process {}", std::process::id())), "{error}");
    drop(first);
    SwapFile::open(&path, Some(MIB)).unwrap();
}

#[test]
fn full_disk_is_an_error_with_figures_and_leaves_nothing() {
    let place = Place::new();
    let path = place.path("swap");
    let error = SwapFile::open(&path, Some(1 << 58)).unwrap_err();
    assert!(matches!(error, SwapFileError::NoSpace { .. }), "{error}");
    assert!(error.to_string().contains("available"), "{error}");
    assert!(!path.exists());
    assert!(matches!(SwapFile::open(&path, Some(4095)), Err(SwapFileError::Empty(4095))));
    assert!(!path.exists());
}

#[test]
fn direct_io_reads_and_writes_pages() {
    #[repr(align(4096))]
    struct Page([u8; 4096]);
    let place = Place::new();
    let swap = SwapFile::open(&place.path("swap"), Some(MIB)).unwrap();
    let flags = nix::fcntl::fcntl(swap.fd(), nix::fcntl::FcntlArg::F_GETFL).unwrap();
    assert_eq!(swap.direct(), flags & libc::O_DIRECT != 0);
    nix::sys::uio::pwrite(swap.fd(), &Page([7; 4096]).0, 8192).unwrap();
    let mut page = Page([0; 4096]);
    assert_eq!(nix::sys::uio::pread(swap.fd(), &mut page.0, 8192), Ok(4096));
    assert!(page.0.iter().all(|byte| *byte == 7));
}

#[test]
fn file_in_ram_is_for_tests_without_direct_io_and_never_temporary() {
    if !Path::new(SHM).is_dir() {
        return;
    }
    let dir = tempfile::tempdir_in(SHM).unwrap();
    let swap = SwapFile::open(&dir.path().join("swap"), Some(MIB)).unwrap();
    assert!(!swap.direct());
    let error = SwapFile::temporary(dir.path(), MIB).unwrap_err();
    assert!(
        matches!(error, SwapFileError::InRam(_)) && error.to_string().contains("FMALLOC_SWAP_DIR"),
        "{error}"
    );
}

#[test]
fn temporary_file_has_no_name_and_grows_to_its_maximum() {
    let place = Place::new();
    let swap = SwapFile::temporary(&place.path(""), 8 * MIB).unwrap();
    assert_eq!(fs::read_dir(place.path("")).unwrap().count(), 0);
    assert_eq!((swap.path(), swap.max_bytes()), (None, 8 * MIB));
    assert!(swap.bytes() <= 4096);
    std::thread::scope(|scope| {
        for step in 1..=8 {
            let swap = &swap;
            scope.spawn(move || swap.grow(step * MIB).unwrap());
        }
    });
    assert_eq!(swap.bytes(), 8 * MIB);
    let stat = nix::sys::stat::fstat(swap.fd().as_fd()).unwrap();
    assert_eq!((stat.st_nlink, stat.st_size, stat.st_mode & 0o777), (0, 8 << 20, 0o600));
    assert!(stat.st_blocks * 512 >= 8 << 20);
    assert_eq!(swap.grow(8 * MIB + 1).unwrap_err().kind(), std::io::ErrorKind::StorageFull);
    assert_eq!(swap.bytes(), 8 * MIB);
}

/// A loop device over a file of 16 MiB, if this system lets us have one.
struct LoopDevice(String);

impl LoopDevice {
    fn new(place: &Place) -> Option<Self> {
        let image = place.path("image");
        fs::File::create(&image).unwrap().set_len(16 * MIB).unwrap();
        let output = Command::new("losetup").args(["--find", "--show"]).arg(&image).output().ok()?;
        let name = String::from_utf8(output.stdout).unwrap().trim().to_owned();
        output.status.success().then_some(Self(name))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn block_device_is_used_whole_or_in_part_and_exclusively() {
    let place = Place::new();
    let Some(device) = LoopDevice::new(&place) else {
        eprintln!("skipped: no loop device");
        return;
    };
    let link = place.path("by-id");
    symlink(&device.0, &link).unwrap();
    let swap = SwapFile::open(&link, None).unwrap();
    assert_eq!(swap.bytes(), 16 * MIB);
    let error = SwapFile::open(Path::new(&device.0), None).unwrap_err();
    assert!(error.to_string().contains(&format!("process {}", std::process::id())), "{error}");
    drop(swap);
    assert_eq!(SwapFile::open(&link, Some(8 * MIB)).unwrap().max_bytes(), 8 * MIB);
    assert!(matches!(SwapFile::open(&link, Some(17 * MIB)), Err(SwapFileError::SmallDevice { .. })));
}
