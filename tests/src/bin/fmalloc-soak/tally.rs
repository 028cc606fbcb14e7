//! What the soak counts, and the table at its end.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use comfy_table::{CellAlignment, Table, presets};
use fmalloc_tests::Daemon;
use serde_json::Value;

/// How long the daemon may take to notice that everybody has gone.
const PATIENCE: Duration = Duration::from_secs(30);

/// See the module. Counted by many threads.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) clients: AtomicU64,
    pub(crate) hostile: AtomicU64,
    /// Pages, cells and steps that were checked and right.
    pub(crate) verified: AtomicU64,
    pub(crate) faults: AtomicU64,
    pub(crate) pages_out: AtomicU64,
    pub(crate) kills: AtomicU64,
    pub(crate) stops: AtomicU64,
    pub(crate) injected: AtomicU64,
    /// Pages of clients whose disk failed for good, each of which gave an error.
    pub(crate) given_up: AtomicU64,
    pub(crate) refused: AtomicU64,
    lost: AtomicU64,
    over_budget: AtomicU64,
    slots_leaked: AtomicU64,
    frames_leaked: AtomicU64,
    failures: Mutex<Vec<String>>,
}

/// Adds to a count.
pub(crate) fn add(count: &AtomicU64, more: u64) {
    count.fetch_add(more, Ordering::Relaxed);
}

impl Tally {
    /// Something is not as it must be.
    pub(crate) fn failed(&self, text: String) {
        eprintln!("soak: FAILED: {text}");
        self.failures.lock().unwrap().push(text);
    }

    /// A page did not hold what was written to it.
    pub(crate) fn lost(&self, text: String) {
        add(&self.lost, 4096);
        self.failed(text);
    }

    /// A client held more than its budget.
    pub(crate) fn over_budget(&self, bytes: u64, row: &Value) {
        add(&self.over_budget, bytes);
        self.failed(format!("{bytes} bytes beyond the budget: {row}"));
    }

    pub(crate) fn failures(&self) -> usize {
        self.failures.lock().unwrap().len()
    }

    /// Nobody is there any more: what is still taken has leaked.
    pub(crate) fn look_for_leaks(&self, daemon: &Daemon) {
        let begin = Instant::now();
        loop {
            let [clients, granted, used, claimed] =
                ["clients", "pool_granted_bytes", "swap_used_bytes", "swap_claimed_bytes"]
                    .map(|field| daemon.status(field));
            if (clients, granted, used, claimed) == (0, 0, 0, 0) {
                return;
            }
            if begin.elapsed() > PATIENCE {
                self.slots_leaked.store(used.max(claimed) / 4096, Ordering::Relaxed);
                self.frames_leaked.store(granted / 4096, Ordering::Relaxed);
                let rows = daemon.json(&["clients"]);
                return self.failed(format!(
                    "left at the end: {clients} clients, {granted} bytes of RAM, {used} of slots, {claimed} claimed: {rows}"
                ));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    pub(crate) fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_preset(presets::NOTHING);
        let rows: [(&str, &AtomicU64); 14] = [
            ("clients", &self.clients),
            ("  of these, hostile", &self.hostile),
            ("  refused, the pool being full", &self.refused),
            ("operations verified", &self.verified),
            ("faults", &self.faults),
            ("pages written to swap", &self.pages_out),
            ("kills", &self.kills),
            ("stops and continuations", &self.stops),
            ("injected errors of swap I/O", &self.injected),
            ("pages given up with an error, where the disk failed for good", &self.given_up),
            ("bytes lost", &self.lost),
            ("bytes beyond a budget", &self.over_budget),
            ("slots leaked", &self.slots_leaked),
            ("frames leaked", &self.frames_leaked),
        ];
        for (what, count) in rows {
            table.add_row([what.to_owned(), count.load(Ordering::Relaxed).to_string()]);
        }
        if let Some(column) = table.column_mut(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table
    }
}
