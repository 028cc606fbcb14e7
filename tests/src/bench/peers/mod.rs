//! Setting up what is compared. A [`Stage`] is a machine on which one peer is in effect; dropped, it is as before.

pub(crate) mod fmalloc;
pub(crate) mod swap;
pub(crate) mod zram;
mod zswap;

use std::path::PathBuf;

use anyhow::{Result, bail};
use fmalloc_proto::size::Size;

use super::kinds::Peer;
use super::undo::{Change, Undo};
use swap::SwapFile;
use zram::Zram;
use zswap::Zswap;

/// More percent of RAM than any pool here takes.
const NO_LIMIT: u64 = 90;

/// One peer in effect.
#[derive(Debug)]
pub(crate) struct Stage {
    pool: Option<Pool>,
    /// What the table says about the peer, such as the compressor.
    pub(crate) note: Option<String>,
    // Dropped in this order: swap ends before zswap's settings change.
    _swap: Option<Change>,
    _zswap: Option<Zswap>,
    _zram: Option<Zram>,
}

/// Compressed pages outside any cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Pool {
    /// Of zswap.
    Zswap,
    /// Of the zram device that the kernel shows here.
    Zram(PathBuf),
}

impl Pool {
    /// Bytes that it takes now.
    pub(crate) fn bytes(&self) -> u64 {
        match self {
            Self::Zswap => zswap::pool(),
            Self::Zram(directory) => Zram::pool(directory),
        }
    }
}

impl Stage {
    /// Sets the peer up. Its pool of compressed pages may have `pool_limit` bytes, if it can be limited.
    ///
    /// # Errors
    /// Why the peer is not to be had on this machine.
    pub(crate) fn set(undo: &Undo, peer: Peer, swap: &SwapFile, pool_limit: Option<u64>) -> Result<Self> {
        let mut stage = Self { pool: None, note: None, _swap: None, _zswap: None, _zram: None };
        match peer {
            Peer::KernelSwap => stage._swap = Some(swap.on(undo)?),
            Peer::Zswap => {
                let percent = pool_limit.map_or(Ok(NO_LIMIT), percent_of_ram)?;
                let zswap = Zswap::on(undo, percent)?;
                stage._swap = Some(swap.on(undo)?);
                let limit =
                    pool_limit.map_or_else(String::new, |_| format!(", pool at most {percent} % of RAM"));
                stage.note = Some(format!("{}{limit}", zswap.compressor));
                stage.pool = Some(Pool::Zswap);
                stage._zswap = Some(zswap);
            }
            Peer::Zram => {
                let zram = Zram::on(undo, swap.bytes)?;
                stage.note = Some(zram.compressor.clone());
                stage.pool = Some(Pool::Zram(zram.directory().to_owned()));
                stage._zram = Some(zram);
            }
            Peer::Fmalloc | Peer::FileMmap | Peer::FileMmapRandom | Peer::Native => {}
        }
        Ok(stage)
    }

    /// The compressed pages that this peer has outside its cgroup.
    pub(crate) fn pool(&self) -> Option<&Pool> {
        self.pool.as_ref()
    }
}

/// Whole percent of RAM, the unit in which zswap's pool is limited.
fn percent_of_ram(bytes: u64) -> Result<u64> {
    let granule = zswap::granule().max(1);
    match bytes / granule {
        0 => bail!("its pool cannot be kept below {}, 1 % of this machine's RAM", Size(granule)),
        percent => Ok(percent.min(NO_LIMIT)),
    }
}
