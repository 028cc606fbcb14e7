//! Room and speed of the file systems where swap is or would be. Writes one unlinked temporary file in each, of at
//! most 64 MiB, for less than two seconds.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fmalloc_proto::size::Size;
use fmalloc_proto::{PAGE, PAGE_SIZE};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statfs::fstatfs;

use super::report::{Report, State, as_root};
use super::uffd::errno;
use crate::swap::file::room;

const FILE: u64 = 64 << 20;
/// As the daemon writes out, roughly.
const CHUNK: usize = 256 << 10;
/// For each of the three measurements.
const TIME: Duration = Duration::from_millis(500);
/// Less than this and hardly anything can be swapped.
const SCANTY: u64 = 1 << 30;
/// A 4 KiB read that takes longer makes for a slow program.
const SLOW_READ: Duration = Duration::from_millis(2);

/// File systems by the kernel's magic numbers: the name, and what is wrong with swap on it.
const KINDS: [(u32, &str, &str); 13] = [
    (0xef53, "ext4", ""),
    (0x5846_5342, "xfs", ""),
    (0xf2f5_2010, "f2fs", ""),
    (0x9123_683e, "btrfs", ""),
    (0x2fc1_2fc1, "zfs", ""),
    (0x794c_7630, "overlayfs", ""),
    (0x0102_1994, "tmpfs", IN_RAM),
    (0x8584_58f6, "ramfs", IN_RAM),
    (0x6969, "nfs", REMOTE),
    (0xff53_4d42, "cifs", REMOTE),
    (0xfe53_4d42, "smb", REMOTE),
    (0x0102_1997, "9p", REMOTE),
    (0x6573_5546, "fuse", REMOTE),
];
const IN_RAM: &str =
    "swap there takes the very RAM that it is to save; fmallocd refuses it for private daemons";
const REMOTE: &str =
    "every fault waits for another machine or program; and DMA into regions may not be pinned";

/// `places`: for what, and the directory.
pub(super) fn examine(report: &mut Report, places: &[(&'static str, PathBuf)], measure: bool) {
    report.area("disk");
    let mut measured = Vec::new();
    for (purpose, dir) in places {
        let name = format!("{purpose} swap");
        let (file, kind) = match probe(dir) {
            Ok(found) => found,
            Err(error) => {
                let found = format!("{}: {error}", dir.display());
                let (cost, mend) =
                    ("swap cannot be there", "name another directory: --swap-dir or FMALLOC_SWAP_DIR");
                report.lacks(&name, State::Blocks, found, cost, mend);
                continue;
            }
        };
        space(report, &name, dir, kind);
        let device = file.metadata().map(|meta| meta.dev()).ok();
        if measured.contains(&device) {
            continue;
        }
        measured.push(device);
        if measure && kind.1 != IN_RAM {
            speed(report, dir);
        }
    }
}

type Kind = (&'static str, &'static str);

fn probe(dir: &Path) -> io::Result<(File, Kind)> {
    let file = File::open(dir)?;
    let magic = fstatfs(&file)?.filesystem_type().0;
    let kind = KINDS.iter().find(|kind| i64::from(kind.0) == magic & 0xffff_ffff);
    Ok((file, kind.map_or(("another file system", ""), |kind| (kind.1, kind.2))))
}

fn space(report: &mut Report, name: &str, dir: &Path, (kind, trouble): Kind) {
    let room = room(dir).unwrap_or(0);
    let found = format!("{} ({kind}), room for {}", dir.display(), Size(room));
    if !trouble.is_empty() {
        let mend =
            "name a directory on a local disk: --swap-dir or FMALLOC_SWAP_DIR, or `swap` in fmallocd.toml";
        report.lacks(name, State::Costs, found, trouble, mend);
    } else if room < SCANTY {
        let mend = format!("free some: {}", as_root(&format!("du -xh -d 3 {} | sort -h", mount_of(dir))));
        report.lacks(name, State::Costs, found, "little memory can be swapped out", mend);
    } else {
        report.ok(name, found);
    }
}

/// Where the file system of `dir` is mounted.
fn mount_of(dir: &Path) -> String {
    let device = |path: &Path| path.metadata().map(|meta| meta.dev()).ok();
    let own = device(dir);
    dir.ancestors().take_while(|place| device(place) == own).last().unwrap_or(dir).display().to_string()
}

fn speed(report: &mut Report, dir: &Path) {
    let file = match temporary(dir, libc::O_DIRECT) {
        Ok(file) => file,
        Err(error) if errno(&error) == nix::errno::Errno::EINVAL => {
            return report.lacks(
                "direct I/O",
                State::Costs,
                format!("not on this file system: {}", dir.display()),
                "swap goes through the page cache, which takes RAM beside all budgets",
                "name a directory on ext4, xfs or btrfs: --swap-dir or FMALLOC_SWAP_DIR",
            );
        }
        Err(error) => {
            // For instance the service's directory, which is root's own affair.
            return report.note("speed", format!("not measured in {}: {error}", dir.display()));
        }
    };
    match measure(&file, dir) {
        Ok(Speed { write, read, random }) => {
            let us = u64::try_from(random.as_micros()).unwrap_or(u64::MAX);
            let found = format!(
                "{}/s written, {}/s read in a row; {us} µs for a page at random",
                Size(write),
                Size(read)
            );
            report.ok("direct I/O", dir.display().to_string());
            for (name, value) in
                [("disk_write_bytes_s", write), ("disk_read_bytes_s", read), ("disk_page_us", us)]
            {
                report.figure(name, value);
            }
            if random > SLOW_READ {
                let cost = "programs that touch memory at random mostly wait: give them budgets that hold what they use";
                report.lacks(
                    "speed",
                    State::Costs,
                    found,
                    cost,
                    "name a directory on an SSD: --swap-dir or FMALLOC_SWAP_DIR",
                );
            } else {
                report.ok("speed", found);
            }
        }
        Err(error) => {
            let found = format!("{}: {error}", dir.display());
            report.lacks("speed", State::Costs, found, "swap there would fail in the same way", "");
        }
    }
}

/// Bytes a second in a row, and the time for a page at random.
struct Speed {
    write: u64,
    read: u64,
    random: Duration,
}

fn measure(file: &File, dir: &Path) -> io::Result<Speed> {
    let chunk = to_u64(CHUNK);
    let size = FILE.min(room(dir)? / 4) / chunk * chunk;
    if size == 0 {
        return Err(io::Error::from_raw_os_error(libc::ENOSPC));
    }
    let length = i64::try_from(size).map_err(io::Error::other)?;
    fallocate(file, FallocateFlags::empty(), 0, length)?;
    let mut buffer = Buffer::new();
    // Bytes that no file system can compress or leave out.
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    buffer.bytes().chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&random.next().to_ne_bytes()));

    let mut in_a_row = |write: bool, bytes: u64| -> io::Result<(u64, u64)> {
        let (start, mut offset) = (Instant::now(), 0);
        while offset < bytes && start.elapsed() < TIME {
            if write {
                file.write_all_at(buffer.bytes(), offset)?;
            } else {
                file.read_exact_at(buffer.bytes(), offset)?;
            }
            offset += chunk;
        }
        let us = start.elapsed().as_micros().max(1);
        Ok((offset, u64::try_from(u128::from(offset) * 1_000_000 / us).unwrap_or(u64::MAX)))
    };
    let (written, write) = in_a_row(true, size)?;
    let (_, read) = in_a_row(false, written)?;

    let (start, mut count) = (Instant::now(), 0_u32);
    while start.elapsed() < TIME {
        let page = random.next() % (written / PAGE);
        file.read_exact_at(&mut buffer.bytes()[..PAGE_SIZE], page * PAGE)?;
        count += 1;
    }
    Ok(Speed { write, read, random: start.elapsed() / count.max(1) })
}

fn to_u64(n: usize) -> u64 {
    fmalloc_proto::num::to_u64(n)
}

/// A file that vanishes with its descriptor.
fn temporary(dir: &Path, flags: i32) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    let unnamed = options.clone().custom_flags(libc::O_TMPFILE | flags).open(dir);
    match unnamed {
        Err(error)
            if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL)) => {}
        other => return other,
    }
    // The file system knows no unnamed files, or no direct I/O.
    let path = dir.join(format!(".fmalloc-doctor-{}", std::process::id()));
    let opened = options.create_new(true).custom_flags(flags).open(&path);
    let _ = std::fs::remove_file(&path);
    opened
}

/// Memory as direct I/O wants it: aligned to a page.
struct Buffer(Vec<u8>);

impl Buffer {
    fn new() -> Self {
        Self(vec![0; CHUNK + PAGE_SIZE])
    }

    fn bytes(&mut self) -> &mut [u8] {
        let skip = self.0.as_ptr().align_offset(PAGE_SIZE);
        &mut self.0[skip..skip + CHUNK]
    }
}

/// Marsaglia's xorshift: good enough to spread reads.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measuring_leaves_no_file() {
        let dir = tempfile::Builder::new().prefix("fmalloc-disk-").tempdir_in("/var/tmp").unwrap();
        let file = temporary(dir.path(), 0).unwrap();
        let speed = measure(&file, dir.path()).unwrap();
        assert!(speed.write > 0 && speed.read > 0 && !speed.random.is_zero());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn mount_is_the_topmost_directory_of_the_file_system() {
        assert_eq!(mount_of(Path::new("/")), "/");
        let mount = mount_of(Path::new("/proc/self"));
        assert_eq!(mount, "/proc");
    }
}
