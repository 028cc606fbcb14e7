//! Every size limit of the protocol, each with its reason. Both sides check them.

/// Bytes of a page: the unit of paging, of frames and of slots.
pub const PAGE_SIZE: usize = 4096;
/// [`PAGE_SIZE`] as the type of addresses and lengths.
pub const PAGE: u64 = 4096;
/// Lowest and highest protocol version that this build speaks.
pub const VERSION_MIN: u16 = 1;
/// See [`VERSION_MIN`].
pub const VERSION_MAX: u16 = 1;
/// Largest message in bytes, header included: a page of a long listing fits, a hostile peer cannot make the
/// daemon hold more than this per connection.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// Most file descriptors in one message: [`crate::messages::Reply::Adopted`] carries five.
pub const MAX_FDS: usize = 5;
/// Longest client name or region label in bytes, as shown by `fmallocctl`.
pub const MAX_NAME: usize = 64;
/// Longest error text in bytes.
pub const MAX_TEXT: usize = 1024;
/// Most rows in one page of a listing; longer listings are asked for page by page.
pub const MAX_ROWS: usize = 64;
/// Most runs in one [`crate::messages::Changed`]: with 18 bytes each they fit into a message.
pub const MAX_RUNS: usize = 2048;
/// Longest region in bytes: 64 TiB, half of a 47-bit address space.
pub const MAX_REGION: u64 = 1 << 46;
/// Furthest end of a mapped part of a file, in bytes: offsets of the system are signed.
pub const MAX_FILE: u64 = 1 << 62;
/// Addresses at and above this are never the user's on 64-bit Linux.
pub const MAX_ADDRESS: u64 = 1 << 47;
/// Smallest budget that a client may have: the ring, the I/O buffers and the page tables come out of it, and
/// an instruction may need several pages at once.
pub const MIN_BUDGET: u64 = 4 << 20;
/// Most batches in a ring.
pub const MAX_BATCHES: u32 = 16;
/// Most pages in one batch of a ring.
pub const MAX_BATCH_PAGES: u32 = 256;
