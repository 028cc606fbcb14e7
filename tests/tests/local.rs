//! Paging for one process in the words that Windows has too: the same tests as under wine, with a private daemon.

#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]

// A private daemon has no more RAM to grant than its first budget: `budgets` is for Windows.
#[path = "../../client/tests/shared/mod.rs"]
mod shared;

use std::process::Command;
use std::sync::Once;

use fmalloc_client::{Error, LocalOptions, Pager};
use fmalloc_tests::place;
use shared::BUDGET;

const SWAP: u64 = 256 << 20;

fn pager() -> Option<Pager> {
    static DAEMON: Once = Once::new();
    place::can_page().then(|| {
        // SAFETY: before any pager, and so any thread of this library; the test harness does not read this variable.
        DAEMON.call_once(|| unsafe { std::env::set_var("FMALLOC_DAEMON", place::binary("fmallocd")) });
        shared::pager(BUDGET, SWAP)
    })
}

#[test]
fn local_pattern_survives_at_sixteen_times_the_budget() {
    let Some(pager) = pager() else { return };
    shared::pattern(&pager, 1);
}

#[test]
fn local_pattern_survives_with_eight_threads() {
    let Some(pager) = pager() else { return };
    shared::pattern(&pager, 8);
}

#[test]
fn local_stampede_on_one_page_loses_no_write() {
    let Some(pager) = pager() else { return };
    shared::stampede(&pager, 8);
}

#[test]
fn local_random_changes_agree_with_a_copy() {
    let Some(pager) = pager() else { return };
    shared::shadow(&pager, 1);
    shared::shadow(&pager, 2);
}

#[test]
fn local_regions_share_a_budget_and_come_and_go() {
    let Some(pager) = pager() else { return };
    shared::two_regions(&pager);
    shared::never_written(&pager);
    shared::coming_and_going(&pager, 8);
}

#[test]
fn local_sparse_region_is_usable_where_committed() {
    let Some(pager) = pager() else { return };
    shared::sparse(&pager);
}

#[test]
fn local_pins_let_files_be_read_and_written() {
    let Some(pager) = pager() else { return };
    shared::files(&pager, &mut tempfile::tempfile_in("/var/tmp").unwrap());
}

#[test]
fn local_example_that_runs_on_every_system() {
    if !place::can_page() {
        return;
    }
    let mut example = Command::new(place::binary("examples/everywhere"));
    let output = example.env("FMALLOC_DAEMON", place::binary("fmallocd")).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("all right"), "{output:?}");
}

#[test]
fn local_budget_that_is_too_small_is_refused_with_a_reason() {
    let error = Pager::local(&LocalOptions::new(4096, SWAP)).unwrap_err();
    assert!(matches!(&error, Error::Invalid { what } if what.contains("at least")), "{error}");
}

#[test]
fn local_options_that_only_windows_has_are_refused() {
    let mut options = LocalOptions::new(BUDGET, SWAP);
    options.keep = true;
    assert!(matches!(Pager::local(&options), Err(Error::Unsupported { .. })));
}
