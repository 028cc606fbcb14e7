//! The tables for people.

use std::collections::BTreeMap;
use std::fmt::Write;

use comfy_table::{CellAlignment, Table, presets};
use fmalloc_proto::size::Size;

use super::figures::Spread;
use super::kinds::{Peer, Scenario, Workload};
use super::report::{CpuRow, FloorRow, LatencyRow, Report, Row};

/// All tables of a report.
pub(crate) fn all(report: &Report) -> String {
    let mut text = format!("{}\n", report.machine.line());
    for (scenario, ram) in &report.scenarios {
        let rows: Vec<&Row> = report.results.iter().filter(|row| row.scenario == *scenario).collect();
        let _ = writeln!(
            text,
            "\n{scenario}: {} of {} data in {} of RAM; medians of {} runs (least - greatest); ×: fmalloc to the peer, above \
             1 fmalloc is faster",
            Size(report.size),
            if scenario.is_random() { "random" } else { "half-compressible" },
            Size(*ram),
            report.runs,
        );
        text.push_str(&comparison(&rows, report, *scenario));
        for (reason, places) in reasons(&rows) {
            let _ = writeln!(text, "- {}: {reason}", places.join(", "));
        }
        let times: Vec<_> = report.latency.iter().filter(|row| row.scenario == *scenario).collect();
        if !times.is_empty() {
            let _ = writeln!(text, "\n{scenario}: single faults of random reads, one thread, in µs");
            text.push_str(&latency(&times));
        }
        let times: Vec<_> =
            report.cpu.iter().filter(|row| row.scenario == *scenario && shows_cpu(row)).collect();
        if !times.is_empty() {
            let _ = writeln!(text, "\n{scenario}: CPU seconds per million faults, medians");
            text.push_str(&cpu(&times));
        }
    }
    let raw: Vec<&FloorRow> = report.floors.iter().filter(|row| row.scenario.is_none()).collect();
    if !raw.is_empty() {
        text.push_str("\nfloors: the disk itself, direct reads of the same file\n");
        let mut table = table(&["floor", "figure", "unit"]);
        for row in raw {
            table.add_row([row.floor.clone(), figure(&row.value), row.unit.clone()]);
        }
        let _ = writeln!(text, "{table}");
    }
    for warning in &report.warnings {
        let _ = writeln!(text, "WARNING: {warning}");
    }
    text
}

fn comparison(rows: &[&Row], report: &Report, scenario: Scenario) -> String {
    let mut peers: Vec<Peer> = rows.iter().map(|row| row.peer).collect();
    peers.sort_unstable();
    peers.dedup();
    // Without peers there are no rows, without a figure of fmalloc there is none of it alone.
    let alone = report.fmalloc.iter().filter(|row| row.scenario == Some(scenario));
    let mut workloads: Vec<Workload> =
        alone.filter_map(|row| row.workload).chain(rows.iter().map(|row| row.workload)).collect();
    workloads.sort_unstable();
    workloads.dedup();
    let mut head = vec!["workload".to_owned(), "unit".to_owned(), Peer::Fmalloc.to_string()];
    head.extend(peers.iter().map(ToString::to_string));
    head.push(Peer::Native.to_string());
    let head: Vec<&str> = head.iter().map(String::as_str).collect();
    let mut table = table(&head);
    for workload in workloads {
        let of = |peer: Peer| rows.iter().find(|row| row.workload == workload && row.peer == peer);
        let is_of = |row: &&FloorRow| (row.scenario, row.workload) == (Some(scenario), Some(workload));
        let ours = report.fmalloc.iter().find(is_of).map_or("-".to_owned(), |row| figure(&row.value));
        let bound = rows.iter().any(|row| row.workload == workload && row.fmalloc_status.is_some());
        let at_most = if bound && ours != "-" { "≤ " } else { "" };
        let mut cells = vec![workload.to_string(), workload.unit().to_string(), format!("{at_most}{ours}")];
        cells.extend(peers.iter().map(|peer| of(*peer).map_or_else(String::new, |row| cell(row))));
        let native = report.floors.iter().find(is_of);
        cells.push(native.map_or_else(String::new, |row| number(row.value.median)));
        table.add_row(cells);
    }
    format!("{table}\n")
}

/// The ratio, and the peer's figures below it.
fn cell(row: &Row) -> String {
    let (Some(value), Some(ratio)) = (&row.peer_value, &row.ratio) else { return "-".to_owned() };
    let (least, most) = if row.status == "bound" { ("≥ ", "≤ ") } else { ("", "") };
    format!("{least}×{}\n{most}{}", figure(ratio), figure(value))
}

fn latency(rows: &[&LatencyRow]) -> String {
    let mut table = table(&["peer", "p50", "p99", "p99.9", "faults"]);
    for row in rows {
        let times = [&row.p50, &row.p99, &row.p999].map(figure);
        table.add_row([&[row.peer.to_string()], &times[..], &[row.faults.to_string()]].concat());
    }
    format!("{table}\n")
}

/// Only workloads of which each operation is a fault or a hit: elsewhere pages come without faults.
fn shows_cpu(row: &CpuRow) -> bool {
    matches!(row.workload, Workload::RandRead1 | Workload::RandRead8 | Workload::RandWrite1)
        && row.peer != Peer::Native
}

fn cpu(rows: &[&CpuRow]) -> String {
    let mut table =
        table(&["workload", "peer", "client user", "client system", "daemon user", "daemon system", "all"]);
    for row in rows {
        let times =
            [row.client.user, row.client.system, row.daemon.user, row.daemon.system, row.total].map(number);
        table.add_row([&[row.workload.to_string(), row.peer.to_string()], &times[..]].concat());
    }
    format!("{table}\n")
}

/// Reasons why there is no figure, each with the places where it holds.
fn reasons(rows: &[&Row]) -> BTreeMap<String, Vec<String>> {
    let mut reasons: BTreeMap<String, BTreeMap<Peer, Vec<String>>> = BTreeMap::new();
    for row in rows {
        if let Some(reason) = &row.reason {
            let places = reasons.entry(reason.clone()).or_default().entry(row.peer).or_default();
            places.push(row.workload.to_string());
        }
        if let Some(status) = &row.fmalloc_status {
            let places = reasons.entry(status.clone()).or_default().entry(Peer::Fmalloc).or_default();
            if !places.contains(&row.workload.to_string()) {
                places.push(row.workload.to_string());
            }
        }
    }
    let text = |(peer, workloads): (Peer, Vec<String>)| format!("{peer} ({})", workloads.join(" "));
    reasons.into_iter().map(|(reason, places)| (reason, places.into_iter().map(text).collect())).collect()
}

fn table(head: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_BORDERS_ONLY).set_header(head);
    for (index, column) in table.column_iter_mut().enumerate() {
        if index > 0 {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

fn figure(spread: &Spread) -> String {
    if spread.min == spread.max {
        return number(spread.median);
    }
    format!("{} ({} - {})", number(spread.median), number(spread.min), number(spread.max))
}

/// Three digits that count.
fn number(value: f64) -> String {
    let decimals = match value.abs() {
        value if value >= 99.95 => 0,
        value if value >= 9.995 => 1,
        _ => 2,
    };
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits() {
        let texts = [0.126, 1.0, 9.99, 12.34, 99.99, 1234.5].map(number);
        assert_eq!(texts, ["0.13", "1.00", "9.99", "12.3", "100", "1234"]);
    }
}
