//! Files in memory.

use std::collections::HashMap;
use std::fs::File;
use std::sync::{LazyLock, Mutex};

use anyhow::{Context, anyhow, bail, ensure};
use fmalloc_client::mmap::{MmapMut, MmapOptions};
use fmalloc_proto::num::to_u64;
use fmalloc_tests::pattern::{self, WORDS};
use serde_json::{Value, json};

use super::Outcome;
use super::state::{Args, State};

static MAPS: LazyLock<Mutex<HashMap<String, MmapMut>>> = LazyLock::new(Mutex::default);

/// `map NAME PATH shared|copy|atomic [LEN]`
pub(crate) fn map(state: &State, args: &mut Args<'_>) -> Outcome {
    let (name, path, mode) = (args.text()?, args.text()?, args.text()?);
    let file = File::options().read(true).write(true).open(path)?;
    let mut options = MmapOptions::new();
    options.pager(&state.pager()?);
    if let Some(len) = args.optional() {
        options.len(len.parse()?);
    }
    // SAFETY: tests say what becomes of the file.
    let map = unsafe {
        match mode {
            "shared" => options.map_mut(&file),
            "copy" => options.map_copy(&file),
            "atomic" => options.map_atomic(&file),
            _ => bail!("no mode {mode:?}"),
        }
    }
    .map_err(inner)?;
    let region = map.region();
    MAPS.lock().unwrap().insert(name.to_owned(), map);
    Ok(json!(region))
}

/// The library's own error, where there is one: [`super::kind`] knows it.
fn inner(error: std::io::Error) -> anyhow::Error {
    let kind = error.kind();
    match error.downcast::<fmalloc_client::Error>() {
        Ok(error) => anyhow::Error::new(error),
        Err(error) => anyhow!("{kind:?}: {error}"),
    }
}

fn with<T>(name: &str, work: impl FnOnce(&mut MmapMut) -> anyhow::Result<T>) -> anyhow::Result<T> {
    let mut maps = MAPS.lock().unwrap();
    work(maps.get_mut(name).with_context(|| format!("no map {name:?}"))?)
}

/// `map-fill NAME SEED [FIRST COUNT]`
pub(crate) fn fill(args: &mut Args<'_>) -> Outcome {
    let (name, seed) = (args.text()?, args.number()?);
    let (first, count) = (args.number_or(0)?, args.number_or(usize::MAX)?);
    with(name, |map| {
        for (index, page) in pages(map)?.iter_mut().enumerate().skip(first).take(count) {
            pattern::write(seed, to_u64(index), page);
        }
        Ok(Value::Null)
    })
}

/// `map-verify NAME SEED [FIRST COUNT]`
pub(crate) fn verify(args: &mut Args<'_>) -> Outcome {
    let (name, seed) = (args.text()?, args.number()?);
    let (first, count) = (args.number_or(0)?, args.number_or(usize::MAX)?);
    with(name, |map| {
        for (index, page) in pages(map)?.iter().enumerate().skip(first).take(count) {
            pattern::check(seed, to_u64(index), page).map_err(|wrong| anyhow!(wrong))?;
        }
        Ok(Value::Null)
    })
}

fn pages(map: &mut MmapMut) -> anyhow::Result<&mut [[u64; WORDS]]> {
    Ok(map.as_mut_slice_of()?)
}

/// `map-read NAME OFFSET`: a byte.
pub(crate) fn read(args: &mut Args<'_>) -> Outcome {
    let (name, offset) = (args.text()?, args.bytes()?);
    with(name, |map| Ok(map[offset].into()))
}

/// `map-flush NAME`
pub(crate) fn flush(args: &mut Args<'_>) -> Outcome {
    let name = args.text()?;
    with(name, |map| map.flush().map(|()| Value::Null).map_err(inner))
}

/// `map-rewrite NAME PAGES`: changes and flushes all pages again and again, for ever; prints each seed when it is there.
pub(crate) fn rewrite(args: &mut Args<'_>) -> Outcome {
    let (name, count): (&str, usize) = (args.text()?, args.number()?);
    with(name, |map| {
        for seed in 2.. {
            for (index, page) in pages(map)?.iter_mut().enumerate().take(count) {
                pattern::write(seed, to_u64(index), page);
            }
            map.flush()?;
        }
        Ok(Value::Null)
    })
}

/// `map-drop NAME`
pub(crate) fn unmap(args: &mut Args<'_>) -> Outcome {
    let name = args.text()?;
    let map = MAPS.lock().unwrap().remove(name);
    ensure!(map.is_some(), "no map {name:?}");
    Ok(Value::Null)
}
