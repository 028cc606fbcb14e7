//! zswap: compressed pages in RAM in front of the swap file. Its settings are those of the whole machine.

use std::fs;
use std::path::Path;

use anyhow::{Result, bail};
use fmalloc_proto::num::to_u64;

use crate::bench::undo::{Change, Undo, set};

const PARAMETERS: &str = "/sys/module/zswap/parameters";
/// The fastest first.
const COMPRESSORS: [&str; 3] = ["lz4", "lzo-rle", "lzo"];

/// zswap, switched on for as long as the value lives.
#[derive(Debug)]
pub(crate) struct Zswap {
    /// What the kernel compresses with.
    pub(crate) compressor: String,
    _changes: Vec<Change>,
}

impl Zswap {
    /// Switches it on, with a pool of at most so many percent of the machine's RAM.
    ///
    /// # Errors
    /// Why it is not to be had.
    pub(crate) fn on(undo: &Undo, max_percent: u64) -> Result<Self> {
        let file = |name: &str| Path::new(PARAMETERS).join(name);
        if !file("enabled").exists() {
            bail!("this kernel has no zswap (CONFIG_ZSWAP)");
        }
        let mut changes = vec![set(undo, &file("max_pool_percent"), &max_percent.to_string())?];
        changes.push(set(undo, &file("enabled"), "Y")?);
        let read = |name| fs::read_to_string(file(name)).map(|text| text.trim().to_owned());
        // Once it is on, the kernel refuses what it cannot do.
        for name in COMPRESSORS {
            if read("compressor")? == name {
                break;
            }
            if let Ok(change) = set(undo, &file("compressor"), name) {
                changes.push(change);
                break;
            }
        }
        if read("enabled")? != "Y" {
            bail!("zswap cannot be switched on: the kernel has no compressor or no pool for it, see its log");
        }
        // The last change is undone first.
        changes.reverse();
        Ok(Self { compressor: read("compressor")?, _changes: changes })
    }
}

/// Bytes that its pool takes now.
pub(crate) fn pool() -> u64 {
    meminfo("Zswap").unwrap_or(0)
}

/// The pool's smallest limit in bytes: one percent of RAM.
pub(crate) fn granule() -> u64 {
    meminfo("MemTotal").unwrap_or(0) / 100
}

fn meminfo(field: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kib| kib * to_u64(1024))
}
