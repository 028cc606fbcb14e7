//! Which pages the pager core evicts, on traces of page accesses, beside LRU, FIFO and the optimum. No daemon, no memory,
//! no time: the table is the same on every machine.

use clap::Parser;
use fmalloc_tests::replay::{replay, traces};
use serde_json::json;

/// Counts the misses of the pager core on traces of page accesses, beside LRU, FIFO and the optimum
#[derive(Debug, Parser)]
#[command(name = "fmalloc-replay")]
struct Options {
    /// Pages of each trace
    #[arg(long, default_value_t = 16_384)]
    pages: u64,
    /// Seed of the traces
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn main() {
    let options = Options::parse();
    let pages = options.pages.max(1024);
    let mut table = comfy_table::Table::new();
    table.set_header(["trace", "RAM", "fmalloc", "FIFO", "LRU", "optimum"]);
    let mut rows = Vec::new();
    for trace in traces(pages, options.seed) {
        for part in [8, 4, 2] {
            let misses = replay(&trace, pages / part);
            let of = trace.accesses.len();
            #[allow(clippy::cast_precision_loss, reason = "for a table")]
            let share = |misses: u64| 100.0 * misses as f64 / of as f64;
            let shares = [misses.fmalloc, misses.fifo, misses.lru, misses.optimum].map(share);
            rows.push(json!({
                "trace": trace.name, "pages": pages, "frames": misses.frames, "accesses": of,
                "misses": { "fmalloc": misses.fmalloc, "fifo": misses.fifo, "lru": misses.lru, "optimum": misses.optimum },
            }));
            let name = if part == 8 { trace.name } else { "" };
            let mut row = vec![name.to_owned(), format!("1/{part}")];
            row.extend(shares.map(|share| format!("{share:.1} %")));
            table.add_row(row);
        }
    }
    if options.json {
        println!("{}", json!(rows));
    } else {
        println!(
            "Misses beyond first touches, of all accesses ({pages} pages, RAM a part of them):\n{table}"
        );
    }
}
