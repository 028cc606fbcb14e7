//! System calls on the swap file and its views. None of them allocates in this process.

use std::ffi::c_void;
use std::ops::Range;
use std::os::windows::ffi::OsStrExt;
use std::path::Path;
use std::ptr::{NonNull, null, null_mut};

use fmalloc_proto::num::to_usize;
use windows_sys::Win32::Foundation::{
    CloseHandle, ERROR_DISK_FULL, GENERIC_READ, GENERIC_WRITE, GetLastError, HANDLE, INVALID_HANDLE_VALUE,
};
use windows_sys::Win32::Storage::FileSystem::{
    CREATE_NEW, CreateFileW, FILE_ATTRIBUTE_NORMAL, FILE_ATTRIBUTE_NOT_CONTENT_INDEXED, FILE_BEGIN,
    FILE_FLAG_DELETE_ON_CLOSE, GetDiskFreeSpaceExW, GetFileSizeEx, OPEN_EXISTING, ReadFile, SetEndOfFile,
    SetFilePointerEx, WriteFile,
};
use windows_sys::Win32::System::IO::OVERLAPPED;
use windows_sys::Win32::System::Memory::{
    CreateFileMappingW, FILE_MAP_READ, FILE_MAP_WRITE, FlushViewOfFile, MEMORY_MAPPED_VIEW_ADDRESS,
    MapViewOfFile, PAGE_NOACCESS, PAGE_READONLY, PAGE_READWRITE, PrefetchVirtualMemory, UnmapViewOfFile,
    VirtualProtect, VirtualUnlock, WIN32_MEMORY_RANGE_ENTRY,
};
use windows_sys::Win32::System::Threading::GetCurrentProcess;

/// An error number of the system.
pub(super) type Code = u32;

/// A handle, closed when it is dropped.
#[derive(Debug)]
struct Handle(HANDLE);

// SAFETY: handles belong to the process, not to a thread.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: ours, and not used any more.
        unsafe { CloseHandle(self.0) };
    }
}

fn check(done: i32) -> Result<(), Code> {
    // SAFETY: reads a number of this thread.
    if done == 0 { Err(unsafe { GetLastError() }) } else { Ok(()) }
}

fn wide(path: &Path) -> Vec<u16> {
    path.as_os_str().encode_wide().chain([0]).collect()
}

/// An open file that nobody else can open meanwhile.
#[derive(Debug)]
pub(super) struct File(Handle);

/// How to open a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// It must not be there yet.
    New {
        /// It goes away when it is closed, also when this process dies.
        temporary: bool,
    },
    /// It must be there.
    Existing,
}

impl File {
    pub(super) fn open(path: &Path, mode: Mode) -> Result<Self, Code> {
        let (disposition, flags) = match mode {
            Mode::New { temporary: true } => (CREATE_NEW, FILE_FLAG_DELETE_ON_CLOSE),
            Mode::New { temporary: false } => (CREATE_NEW, 0),
            Mode::Existing => (OPEN_EXISTING, 0),
        };
        let flags = FILE_ATTRIBUTE_NORMAL | FILE_ATTRIBUTE_NOT_CONTENT_INDEXED | flags;
        let path = wide(path);
        // SAFETY: the path ends with a zero.
        let handle = unsafe {
            CreateFileW(
                path.as_ptr(),
                GENERIC_READ | GENERIC_WRITE,
                0,
                null(),
                disposition,
                flags,
                null_mut(),
            )
        };
        // SAFETY: reads a number of this thread.
        if handle == INVALID_HANDLE_VALUE { Err(unsafe { GetLastError() }) } else { Ok(Self(Handle(handle))) }
    }

    pub(super) fn len(&self) -> Result<u64, Code> {
        let mut len = 0;
        // SAFETY: writes to a number of ours.
        check(unsafe { GetFileSizeEx(self.0.0, &raw mut len) })?;
        Ok(u64::try_from(len).unwrap_or(0))
    }

    /// Makes the file this long; the file system sets the space aside.
    pub(super) fn set_len(&self, len: u64) -> Result<(), Code> {
        let end = i64::try_from(len).map_err(|_| ERROR_DISK_FULL)?;
        // SAFETY: changes the position of a handle of ours.
        check(unsafe { SetFilePointerEx(self.0.0, end, null_mut(), FILE_BEGIN) })?;
        // SAFETY: changes the length of our file, which has no view yet.
        check(unsafe { SetEndOfFile(self.0.0) })
    }

    /// Reads the first bytes, fewer at the end of the file; gives how many.
    pub(super) fn read_start(&self, to: &mut [u8]) -> Result<usize, Code> {
        let mut got = 0;
        let mut at = place(0);
        let len = u32::try_from(to.len()).unwrap_or(u32::MAX);
        // SAFETY: the buffer has `len` bytes, and the call waits for its end.
        check(unsafe { ReadFile(self.0.0, to.as_mut_ptr(), len, &raw mut got, &raw mut at) })?;
        Ok(to_usize(got.into()))
    }

    /// Writes all bytes. Views of the file show them at once.
    pub(super) fn write_at(&self, mut offset: u64, mut bytes: &[u8]) -> Result<(), Code> {
        while !bytes.is_empty() {
            let mut put = 0;
            let mut at = place(offset);
            let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
            // SAFETY: the buffer has `len` bytes, and the call waits for its end.
            check(unsafe { WriteFile(self.0.0, bytes.as_ptr(), len, &raw mut put, &raw mut at) })?;
            if put == 0 {
                return Err(ERROR_DISK_FULL);
            }
            offset += u64::from(put);
            bytes = bytes.get(to_usize(put.into())..).unwrap_or_default();
        }
        Ok(())
    }

    /// Makes the file a section, of which views can be mapped.
    pub(super) fn section(&self) -> Result<Section, Code> {
        // SAFETY: the file is open for reading and writing; without a length the section is as long as the file.
        let section = unsafe { CreateFileMappingW(self.0.0, null(), PAGE_READWRITE, 0, 0, null()) };
        // SAFETY: reads a number of this thread.
        if section.is_null() { Err(unsafe { GetLastError() }) } else { Ok(Section(Handle(section))) }
    }
}

#[allow(clippy::cast_possible_truncation, reason = "the two halves of the offset")]
fn place(offset: u64) -> OVERLAPPED {
    let mut at = OVERLAPPED::default();
    at.Anonymous.Anonymous.Offset = offset as u32;
    at.Anonymous.Anonymous.OffsetHigh = (offset >> 32) as u32;
    at
}

/// Bytes that this user may still write to the disk of a directory.
pub(super) fn disk_free(directory: &Path) -> Result<u64, Code> {
    let path = wide(directory);
    let mut free = 0;
    // SAFETY: the path ends with a zero; the number is ours.
    check(unsafe { GetDiskFreeSpaceExW(path.as_ptr(), &raw mut free, null_mut(), null_mut()) })?;
    Ok(free)
}

/// A file as a section.
#[derive(Debug)]
pub(super) struct Section(Handle);

impl Section {
    /// Maps a part of the file, without access.
    #[allow(clippy::cast_possible_truncation, reason = "the two halves of the offset")]
    pub(super) fn map(&self, part: &Range<u64>) -> Result<View, Code> {
        let len = to_usize(part.end - part.start);
        let (high, low) = ((part.start >> 32) as u32, part.start as u32);
        // SAFETY: maps anywhere; the part is within the file.
        let view = unsafe { MapViewOfFile(self.0.0, FILE_MAP_READ | FILE_MAP_WRITE, high, low, len) };
        // SAFETY: reads a number of this thread.
        let Some(start) = NonNull::new(view.Value.cast()) else { return Err(unsafe { GetLastError() }) };
        let view = View { start, len };
        view.protect(&(0..len), Access::None).inspect_err(|_| view.unmap())?;
        Ok(view)
    }
}

/// What the program may do with a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    None,
    Read,
    Write,
}

/// A mapped part of the file, or what is left of it in a copy after [`View::unmap`]. Ranges are bytes from its start.
#[derive(Debug, Clone, Copy)]
pub(super) struct View {
    pub(super) start: NonNull<u8>,
    pub(super) len: usize,
}

// SAFETY: the view is an address range; what is in it is the region's business.
unsafe impl Send for View {}
// SAFETY: as above.
unsafe impl Sync for View {}

impl View {
    fn at(&self, range: &Range<usize>) -> *mut c_void {
        debug_assert!(range.start <= range.end && range.end <= self.len);
        self.start.as_ptr().wrapping_add(range.start).cast()
    }

    pub(super) fn protect(&self, range: &Range<usize>, access: Access) -> Result<(), Code> {
        let access = match access {
            Access::None => PAGE_NOACCESS,
            Access::Read => PAGE_READONLY,
            Access::Write => PAGE_READWRITE,
        };
        let mut old = 0;
        // SAFETY: the range is ours; its content does not change.
        check(unsafe { VirtualProtect(self.at(range), range.len(), access, &raw mut old) })
    }

    /// Writes out what was changed in a range.
    pub(super) fn flush(&self, range: &Range<usize>) -> Result<(), Code> {
        // SAFETY: the range is ours; its content does not change.
        check(unsafe { FlushViewOfFile(self.at(range), range.len()) })
    }

    /// Takes a range out of the working set: its RAM is the system's to use.
    pub(super) fn trim(&self, range: &Range<usize>) {
        // SAFETY: as above. Unlocking pages that are not locked is an error, whose effect is what we want.
        unsafe { VirtualUnlock(self.at(range), range.len()) };
    }

    /// Asks the system to read two ranges, in one transfer each. Only a hint; the pages stay outside the working set.
    pub(super) fn prefetch(&self, ranges: [&Range<usize>; 2]) {
        let entries = ranges.map(|range| WIN32_MEMORY_RANGE_ENTRY {
            VirtualAddress: self.at(range),
            NumberOfBytes: range.len(),
        });
        let count = ranges.iter().take_while(|range| !range.is_empty()).count();
        // SAFETY: there are `count` entries; the ranges are ours.
        unsafe { PrefetchVirtualMemory(GetCurrentProcess(), count, entries.as_ptr(), 0) };
    }

    /// The addresses.
    pub(super) fn addresses(&self) -> Range<usize> {
        let start = self.start.as_ptr().expose_provenance();
        start..start + self.len
    }

    /// Gives the addresses back. Nobody may refer to them any more.
    pub(super) fn unmap(self) {
        let view = MEMORY_MAPPED_VIEW_ADDRESS { Value: self.start.as_ptr().cast() };
        // SAFETY: mapped in `Section::map`, and the caller's promise.
        unsafe { UnmapViewOfFile(view) };
    }
}
