//! Looks at all clients from outside all the time: nobody holds more than its budget; and how much they do.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use fmalloc_tests::Daemon;
use fmalloc_tests::daemon::number;

use crate::tally::{Tally, add};

const PAUSE: Duration = Duration::from_millis(150);

/// Watches until it is told to end.
pub(crate) fn watch(daemon: &Daemon, tally: &Tally, over: &AtomicBool) {
    // Figures of each client at the last look; they are added up as they grow.
    let mut seen: HashMap<u64, (u64, u64)> = HashMap::new();
    while !over.load(Ordering::Relaxed) {
        let rows = daemon.json(&["clients"]);
        for row in rows.as_array().into_iter().flatten() {
            let (faults, out) = (number(row, "faults"), number(row, "out_bytes") / 4096);
            let before = seen.insert(number(row, "client"), (faults, out)).unwrap_or_default();
            add(&tally.faults, faults.saturating_sub(before.0));
            add(&tally.pages_out, out.saturating_sub(before.1));
            let held = number(row, "resident_bytes") + number(row, "overhead_bytes");
            let budget = number(row, "budget_bytes");
            // A budget that has just been lowered takes effect as pages leave; the soak lowers none.
            if held > budget {
                tally.over_budget(held - budget, row);
            }
        }
        thread::sleep(PAUSE);
    }
}
