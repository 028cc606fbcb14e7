//! zram: a swap device that is compressed pages in RAM. A device of the benchmark's own, removed afterwards.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::swap;
use crate::bench::undo::{Change, Step, Undo, run};

const CONTROL: &str = "/sys/class/zram-control";

/// A zram device that the kernel swaps to, for as long as the value lives.
#[derive(Debug)]
pub(crate) struct Zram {
    directory: PathBuf,
    /// What the kernel compresses with.
    pub(crate) compressor: String,
    _changes: Vec<Change>,
}

impl Zram {
    /// Makes a device that can hold so many bytes of data.
    ///
    /// # Errors
    /// Why it is not to be had.
    pub(crate) fn on(undo: &Undo, bytes: u64) -> Result<Self> {
        let mut changes = Vec::new();
        if !Path::new(CONTROL).exists() {
            let load = || run("modprobe", &["zram", "num_devices=0"]);
            match undo.change(Step::Unload("zram".to_owned()), load) {
                Ok(((), change)) => changes.push(change),
                Err(error) => bail!("this kernel has no zram: {error:#}"),
            }
        }
        let added = fs::read_to_string(Path::new(CONTROL).join("hot_add")).context("adding a zram device")?;
        let number: u32 = added.trim().parse().context("the number of a zram device")?;
        let ((), device) = undo.change(Step::RemoveZram(number), || Ok(()))?;
        let directory = directory(number);
        // The kernel keeps its own choice where it has no lz4.
        let _ = fs::write(directory.join("comp_algorithm"), "lz4");
        let offered = fs::read_to_string(directory.join("comp_algorithm"))?;
        let compressor = offered.split(['[', ']']).nth(1).unwrap_or(offered.trim()).to_owned();
        fs::write(directory.join("disksize"), bytes.to_string()).context("giving the zram device a size")?;
        let swapping = swap::on(undo, &PathBuf::from(format!("/dev/zram{number}")), bytes)?;
        // Dropped in this order.
        changes.splice(0..0, [swapping, device]);
        Ok(Self { directory, compressor, _changes: changes })
    }

    /// Bytes of RAM that it takes now.
    pub(crate) fn pool(directory: &Path) -> u64 {
        let text = fs::read_to_string(directory.join("mm_stat")).unwrap_or_default();
        text.split_whitespace().nth(2).and_then(|bytes| bytes.parse().ok()).unwrap_or(0)
    }

    /// Where the kernel shows it.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }
}

fn directory(number: u32) -> PathBuf {
    PathBuf::from(format!("/sys/block/zram{number}"))
}

/// Empties and removes a device.
///
/// # Errors
/// What the kernel says.
pub(crate) fn remove(number: u32) -> Result<()> {
    if directory(number).exists() {
        fs::write(directory(number).join("reset"), "1").context("resetting a zram device")?;
        fs::write(Path::new(CONTROL).join("hot_remove"), number.to_string())
            .context("removing a zram device")?;
    }
    Ok(())
}
