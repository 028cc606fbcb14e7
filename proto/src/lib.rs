//! What fmalloc's processes say to one another: hello and version negotiation, numbered messages with
//! documented limits, the codec, SEQPACKET transport with file descriptors, and the layout of the eviction
//! ring. Used by the client library, the daemon and the control tool; holds no policy.
//!
//! A connection starts with [`hello::Hello`] and [`hello::HelloReply`], whose bytes are fixed for all versions.
//! After that each packet is one frame: a number, a request id and a body (see [`codec`]).

pub mod codec;
pub mod groups;
pub mod hello;
pub mod limits;
pub mod messages;
pub mod num;
#[cfg(unix)]
pub mod ring;
pub mod size;
pub mod switches;
#[cfg(unix)]
pub mod transport;
pub mod validate;

pub use limits::{PAGE, PAGE_SIZE};
