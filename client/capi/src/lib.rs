//! The C ABI: one heap for the process, behind the functions that `fmalloc.h` declares. Each function checks what it is
//! given as far as that can be done, tells failures by its result, `errno` and a message, and never unwinds.
//!
//! - `state`: which heap there is, from `fmalloc_init` to `fmalloc_close`;
//! - `options`: what it is made of;
//! - `memory`: `fmalloc`, `ffree` and their kin;
//! - `figures`: statistics;
//! - `regions`: pagers and regions by themselves, as the C# binding uses them;
//! - `files`: regions over files;
//! - `failure`: `errno` and the message.

pub mod failure;
pub mod figures;
pub mod files;
pub mod memory;
pub mod options;
pub mod regions;
pub mod state;
