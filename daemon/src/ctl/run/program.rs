//! The program: where it is, and whether the dynamic loader will put a library in front of libc for it.

use std::ffi::{CString, OsStr};
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::unistd::{AccessFlags, access, getegid, geteuid};

use super::{Failure, NOT_FOUND, NOT_RUNNABLE};

/// Scripts whose interpreter is a script, at most, as in the kernel.
const DEPTH: usize = 5;
const SET_UID: u32 = 0o4000;
const SET_GID: u32 = 0o2000;

/// Finds a program as `execvp` does.
pub(super) fn find(name: &OsStr) -> Result<PathBuf, Failure> {
    let missing = |text| Err(Failure::new(NOT_FOUND, format!("{}: {text}", name.display())));
    if name.as_bytes().contains(&b'/') {
        let path = PathBuf::from(name);
        return if path.exists() { Ok(path) } else { missing("no such program") };
    }
    let dirs = std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into());
    let places = std::env::split_paths(&dirs).map(|dir| dir.join(name));
    match places.into_iter().find(|path| path.is_file() && access(path, AccessFlags::X_OK).is_ok()) {
        Some(path) => Ok(path),
        None => missing("no such program in PATH"),
    }
}

/// Says why a program cannot be paged, if so.
pub(super) fn check(path: &Path) -> Result<(), Failure> {
    check_file(path, DEPTH)
        .map_err(|reason| Failure::new(NOT_RUNNABLE, format!("{} cannot be paged: {reason}", path.display())))
}

fn check_file(path: &Path, depth: usize) -> Result<(), String> {
    let meta = fs::metadata(path).map_err(|error| error.to_string())?;
    if meta.is_dir() {
        return Err("it is a directory".to_owned());
    }
    access(path, AccessFlags::X_OK).map_err(|_| "it is not executable by this user".to_owned())?;
    let raised = meta.permissions().mode() & SET_UID != 0 && meta.uid() != geteuid().as_raw()
        || meta.permissions().mode() & SET_GID != 0 && meta.gid() != getegid().as_raw()
        || !geteuid().is_root() && has_capabilities(path);
    if raised {
        return Err("it changes its user, group or capabilities when it starts, so no library can be put in front of \
                    libc; run fmallocctl as the user that it becomes"
            .to_owned());
    }
    let Ok(file) = File::open(path) else {
        // It can be run without being read; then nothing is known.
        return Ok(());
    };
    let mut head = [0; 256];
    let read = file.read_at(&mut head, 0).map_err(|error| error.to_string())?;
    let head = &head[..read];
    if let Some(line) = head.strip_prefix(b"#!") {
        let Some(interpreter) = interpreter(line).filter(|_| depth > 0) else { return Ok(()) };
        return check_file(&interpreter, depth - 1)
            .map_err(|reason| format!("its interpreter {}: {reason}", interpreter.display()));
    }
    match Elf::read(&file, head) {
        // A script without a first line, for the shell.
        None => Ok(()),
        Some(elf) => elf.check(),
    }
}

fn interpreter(line: &[u8]) -> Option<PathBuf> {
    let line = line.split(|byte| *byte == b'\n').next()?;
    let mut words = line.split(|byte| b" \t".contains(byte)).filter(|word| !word.is_empty());
    let program = PathBuf::from(OsStr::from_bytes(words.next()?));
    // What `env` runs is what counts.
    if program.file_name() == Some(OsStr::new("env"))
        && let Some(name) = words.find(|word| !word.starts_with(b"-") && !word.contains(&b'='))
    {
        return find(OsStr::from_bytes(name)).ok();
    }
    Some(program)
}

/// What an ELF file says about how it is loaded.
struct Elf {
    /// 64-bit, little-endian, for this machine.
    ours: bool,
    /// The dynamic loader.
    loader: Option<Vec<u8>>,
}

impl Elf {
    /// The header of a program in ELF, if it is one.
    fn read(file: &File, head: &[u8]) -> Option<Self> {
        const PT_INTERP: u32 = 3;
        const THIS_MACHINE: u16 = if cfg!(target_arch = "aarch64") { 183 } else { 62 };
        let word = |at: usize, len: usize| -> Option<u64> {
            let bytes = head.get(at..at + len)?;
            Some(bytes.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
        };
        head.strip_prefix(b"\x7fELF")?;
        if head.get(4..6) != Some(&[2, 1]) || word(18, 2)? != u64::from(THIS_MACHINE) {
            return Some(Self { ours: false, loader: None });
        }
        let (start, size, count) = (word(32, 8)?, word(54, 2)?, word(56, 2)?);
        let mut loader = None;
        for index in 0..count {
            let mut entry = [0; 56];
            file.read_exact_at(&mut entry, start.checked_add(index * size)?).ok()?;
            let field = |at: usize, len: usize| {
                entry[at..at + len].iter().rev().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte))
            };
            if field(0, 4) == u64::from(PT_INTERP) {
                let mut name = vec![0; usize::try_from(field(32, 8).min(4096)).ok()?];
                file.read_exact_at(&mut name, field(8, 8)).ok()?;
                loader = Some(name);
            }
        }
        Some(Self { ours: true, loader })
    }

    fn check(&self) -> Result<(), String> {
        match &self.loader {
            _ if !self.ours => Err("it is built for another kind of machine than this fmalloc".to_owned()),
            None => Err("it is linked statically, so no library can be put in front of libc; \
                         use one that is linked dynamically"
                .to_owned()),
            Some(name) if name.windows(7).any(|part| part == b"ld-musl") => {
                Err("it uses musl; the library needs glibc".to_owned())
            }
            Some(_) => Ok(()),
        }
    }
}

fn has_capabilities(path: &Path) -> bool {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else { return false };
    // SAFETY: two strings that end with a zero; nothing is written, since there is no room.
    unsafe { libc::getxattr(path.as_ptr(), c"security.capability".as_ptr(), std::ptr::null_mut(), 0) > 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn script(dir: &tempfile::TempDir, name: &str, first: &str) -> PathBuf {
        let path = dir.path().join(name);
        fs::write(&path, format!("{first}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn ordinary_programs_and_scripts_pass() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["sh", "sort", "env"] {
            let path = find(OsStr::new(name)).unwrap();
            check(&path).unwrap();
        }
        check(&script(&dir, "a", "#!/bin/sh -e")).unwrap();
        check(&script(&dir, "b", "#! /usr/bin/env -S A=1 sh")).unwrap();
        check(&script(&dir, "c", "echo without a first line")).unwrap();
    }

    #[test]
    fn what_cannot_be_paged_is_refused_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let refused = |path: &Path| check(path).unwrap_err().text;
        // A header without a dynamic loader, and one for 32 bits.
        let mut header = vec![0_u8; 64];
        header[..6].copy_from_slice(b"\x7fELF\x02\x01");
        header[18] = 62;
        header[32] = 64;
        header[54] = 56;
        let path = script(&dir, "static", "");
        fs::write(&path, &header).unwrap();
        assert!(refused(&path).contains("statically"), "{}", refused(&path));
        header[4] = 1;
        fs::write(&path, &header).unwrap();
        assert!(refused(&path).contains("another kind"));
        // As the interpreter of a script.
        let by = script(&dir, "script", &format!("#!{}", path.display()));
        assert!(refused(&by).contains("interpreter"));
        assert!(refused(dir.path()).contains("directory"));
        let plain = dir.path().join("plain");
        fs::write(&plain, "x").unwrap();
        assert!(refused(&plain).contains("executable"));
        assert_eq!(find(OsStr::new("no-such-program-at-all")).unwrap_err().code, NOT_FOUND);
        assert_eq!(find(OsStr::new("/no/such/program")).unwrap_err().code, NOT_FOUND);
    }
}
