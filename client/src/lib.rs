//! Memory larger than RAM for one program: regions whose pages `fmallocd` moves between RAM and a swap file, within a
//! RAM budget, without kernel swap and without root in the program.
//!
//! ```no_run
//! use fmalloc_client::{Pager, PrivateOptions, Region};
//!
//! # fn main() -> Result<(), fmalloc_client::Error> {
//! // A daemon that runs already, or one for this process alone.
//! let pager = Pager::connect().or_else(|_| Pager::private(&PrivateOptions::new(256 << 20)))?;
//! let mut region = Region::new(&pager, 4 << 30)?;
//! let numbers = region.as_mut_slice_of::<u64>();
//! for (index, number) in numbers.iter_mut().enumerate() {
//!     *number = index as u64;
//! }
//! println!("{} pages are in RAM", pager.stats()?.resident_pages);
//! # Ok(())
//! # }
//! ```
//!
//! A [`Pager`] is a connection with a budget; a [`Region`] is memory paged by it. Both may be used from any thread.
//! Memory of a region is ordinary private memory: pointers into it stay valid, and system calls work on it.
//!
//! # What to know
//!
//! - **A lost daemon**: resident pages go on working, and a thread that touches any other page waits for ever instead
//!   of reading zeros. [`Pager::health`] says so, one line on stderr too, and every call gives [`Error::DaemonGone`].
//!   Regions dropped then leave their addresses mapped. A thread that is just then in [`Region::discard`], or in
//!   `munmap` or `madvise` on a region, waits as well.
//! - **fork**: a child has neither the regions (a touch is SIGSEGV) nor the pager ([`Error::Forked`]); it may make its
//!   own. `exec` inherits nothing. With the option `inherit` and [`fork`] the child has both, as after any fork. A child
//!   that came about in another way (a plain `fork` without [`Pager::prepare_fork`]) may only run another program then:
//!   if it touches what is not resident, it waits for ever.
//! - **Read-only, locked and pinned pages** cannot be evicted: `mprotect(PROT_READ)` and `mlock` keep the pages
//!   concerned in RAM, I/O in flight does so until it ends. They count against the budget, and
//!   [`ClientStats::unevictable_pages`] shows them.
//! - **Reading what was never written** takes a page of RAM as well.
//! - **Core dumps and debuggers** see resident pages only; regions are left out of core dumps.
//! - **madvise, munmap, mremap** by the program on memory of a region do what they do on ordinary memory. A part that
//!   was unmapped, and mapped again by something else, is that other thing's.
//! - **Threads**: each pager has two of its own, with all signals blocked. One signal is used inside: SIGURG, sent to
//!   one of these threads only.
//! - **Seccomp filters** that kill threads (TSYNC with a narrow list) break the agent; install them before the pager, and
//!   allow `poll`, `ioctl`, `madvise`, `mprotect`, `read`, `write`, `pread64`, `sendmsg`, `recvmsg`, `futex`, `tgkill`.

#[cfg(unix)]
mod agent;
#[cfg(unix)]
mod connect;
mod error;
#[cfg(unix)]
mod fork;
mod health;
pub mod heap;
#[cfg(unix)]
mod herald;
#[cfg(unix)]
mod link;
#[cfg(unix)]
mod local;
#[cfg(unix)]
pub mod mmap;
mod options;
mod own;
#[cfg(unix)]
mod pager;
mod pin;
mod pod;
#[cfg(unix)]
mod region;
#[cfg(unix)]
mod spawn;
#[cfg(unix)]
mod sys;
#[cfg(any(windows, test))]
mod windows;

pub use error::Error;
pub use fmalloc_proto::PAGE_SIZE;
pub use fmalloc_proto::groups::Token as GroupToken;
pub use fmalloc_proto::messages::{Advice, ClientStats, ErrorCode};
#[cfg(unix)]
pub use fork::{PreparedFork, fork};
pub use health::Health;
pub use options::{ConnectOptions, LocalOptions, PrivateOptions};
#[cfg(unix)]
pub use pager::Pager;
pub use pin::{Pinned, PinnedMut};
pub use pod::Pod;
#[cfg(unix)]
pub use region::Region;
#[cfg(windows)]
pub use windows::{Pager, Region};
