//! The library's own calls.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::bail;
use fmalloc_client::{Advice, ConnectOptions, PAGE_SIZE, Pager, PrivateOptions, Region};
use fmalloc_tests::place;
use serde_json::{Value, json};

use crate::Outcome;
use crate::state::{Args, State};

/// `connect [BUDGET [NAME]]`: at FMALLOC_SOCKET.
pub(crate) fn connect(state: &State, args: &mut Args<'_>) -> Outcome {
    let budget = args.optional().map(|text| text.parse::<fmalloc_proto::size::Size>()).transpose()?;
    let name = args.optional().map(str::to_owned);
    let options = ConnectOptions {
        budget: budget.map(|size| size.0),
        name,
        user_mode_only: place::is_user_mode(),
        ..ConnectOptions::default()
    };
    let pager = Pager::connect_with(&options)?;
    let granted = pager.budget();
    state.set_pager(Some(pager));
    Ok(granted.into())
}

/// `private BUDGET SWAP_DIR SWAP_SIZE [user-mode-only]`: gives the milliseconds that it took.
pub(crate) fn private(state: &State, args: &mut Args<'_>) -> Outcome {
    let mut options = PrivateOptions::new(args.size()?);
    options.swap_dir = Some(PathBuf::from(args.text()?));
    options.swap_size = Some(args.size()?);
    options.user_mode_only = match args.optional() {
        None => false,
        Some("user-mode-only") => true,
        Some(other) => bail!("what is {other:?}?"),
    };
    let begin = Instant::now();
    let pager = Pager::private(&options)?;
    let time = begin.elapsed();
    state.set_pager(Some(pager));
    Ok(u64::try_from(time.as_millis())?.into())
}

/// Drops all regions and the pager.
pub(crate) fn disconnect(state: &State) -> Outcome {
    state.clear();
    state.set_pager(None);
    Ok(Value::Null)
}

/// Some of the statistics.
pub(crate) fn stats(state: &State) -> Outcome {
    let stats = state.pager()?.stats()?;
    Ok(json!({
        "budget_bytes": stats.budget_bytes,
        "resident_pages": stats.resident_pages,
        "peak_resident_pages": stats.peak_resident_pages,
        "overhead_bytes": stats.overhead_bytes,
        "swapped_pages": stats.swapped_pages,
        "slots": stats.slots,
        "claimed_pages": stats.claimed_pages,
        "unevictable_pages": stats.unevictable_pages,
        "poisoned_pages": stats.poisoned_pages,
        "faults": stats.faults,
        "pages_in": stats.pages_in,
        "pages_out": stats.pages_out,
        "pages_clean": stats.pages_clean,
        "pages_zero": stats.pages_zero,
        "io_errors": stats.io_errors,
        "packed_pages": stats.packed_pages,
        "packed_bytes": stats.packed_bytes,
        "faults_packed": stats.faults_packed,
        "pages_spilled": stats.pages_spilled,
        "peak_held_bytes": stats.peak_held_bytes,
    }))
}

/// `region NAME SIZE`: labelled with its name.
pub(crate) fn region(state: &State, args: &mut Args<'_>) -> Outcome {
    let (name, len) = (args.text()?, args.bytes()?);
    let region = Region::labelled(&state.pager()?, len, name)?;
    let id = region.id();
    state.add(name, region);
    Ok(id.into())
}

/// `sparse NAME SIZE`.
pub(crate) fn sparse(state: &State, args: &mut Args<'_>) -> Outcome {
    let (name, len) = (args.text()?, args.bytes()?);
    let region = Region::sparse(&state.pager()?, len)?;
    let id = region.id();
    state.add(name, region);
    Ok(id.into())
}

/// `drop NAME`.
pub(crate) fn drop_region(state: &State, args: &mut Args<'_>) -> Outcome {
    drop(state.remove(args.text()?)?);
    Ok(Value::Null)
}

/// `commit NAME OFFSET LENGTH`.
pub(crate) fn commit(state: &State, args: &mut Args<'_>) -> Outcome {
    let memory = state.memory(args.text()?)?;
    let part = args.part(&memory)?;
    memory.region.lock().unwrap().commit(part)?;
    Ok(Value::Null)
}

/// `decommit NAME OFFSET LENGTH`.
pub(crate) fn decommit(state: &State, args: &mut Args<'_>) -> Outcome {
    let memory = state.memory(args.text()?)?;
    let part = args.part(&memory)?;
    memory.region.lock().unwrap().decommit(part)?;
    Ok(Value::Null)
}

/// `advise NAME ADVICE [OFFSET LENGTH]`.
pub(crate) fn advise(state: &State, args: &mut Args<'_>) -> Outcome {
    let memory = state.memory(args.text()?)?;
    let advice = match args.text()? {
        "normal" => Advice::Normal,
        "sequential" => Advice::Sequential,
        "random" => Advice::Random,
        "willneed" => Advice::WillNeed,
        "cold" => Advice::Cold,
        other => bail!("no advice {other:?}"),
    };
    let part = args.part(&memory)?;
    memory.region.lock().unwrap().advise(part, advice)?;
    Ok(Value::Null)
}

/// `discard NAME [OFFSET LENGTH]`.
pub(crate) fn discard(state: &State, args: &mut Args<'_>) -> Outcome {
    let memory = state.memory(args.text()?)?;
    let part = args.part(&memory)?;
    memory.region.lock().unwrap().discard(part)?;
    Ok(Value::Null)
}

/// `resident NAME [OFFSET LENGTH]`: how many pages are, and the offsets of the last page that is and of the last that
/// is not.
pub(crate) fn resident(state: &State, args: &mut Args<'_>) -> Outcome {
    let memory = state.memory(args.text()?)?;
    let part = args.part(&memory)?;
    let start = part.start / PAGE_SIZE;
    let map = memory.region.lock().unwrap().resident(part)?;
    let last = |wanted| map.iter().rposition(|there| *there == wanted).map(|n| (start + n) * PAGE_SIZE);
    let pages = map.iter().filter(|there| **there).count();
    Ok(json!({ "pages": pages, "a_resident": last(true), "a_cold": last(false) }))
}
