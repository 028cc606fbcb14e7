//! Paging for one process in the words that Windows has too: the same tests as under wine, with a private daemon.

#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]

// A private daemon has no more RAM to grant than its first budget: `budgets` is for Windows.
#[path = "../../client/tests/shared/mod.rs"]
mod shared;

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
fn local_options_that_only_windows_has_are_refused() {
    let mut options = LocalOptions::new(BUDGET, SWAP);
    options.keep = true;
    assert!(matches!(Pager::local(&options), Err(Error::Unsupported { .. })));
}
