//! How the cost of a fault and the size of page tables depend on how much there is: from a region of 1 GiB to one of 1 TiB,
//! from 1 to 256 clients, from 1 to 1,000 regions. Pages hold one word again and again, so that no fault waits for a disk:
//! what is left is what could grow. Prints a table, and draws it. Build it with `--release`.

use std::ops::Range;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use fmalloc_client::{ConnectOptions, PAGE_SIZE, Pager, Region};
use fmalloc_proto::num::to_u64;
use fmalloc_tests::Daemon;
use fmalloc_tests::rng::Rng;
use plotters::prelude::*;
use serde_json::json;

/// Pages that are next to one another; what a region has of them is spread evenly over it.
const ISLAND: usize = 512;
/// Pages that are touched in all, or by each client.
const PAGES: usize = 16_384;
const PAGES_OF_CLIENT: usize = 2048;
/// Budgets: a quarter of the pages, and what the daemon holds.
const BUDGET: u64 = 24 << 20;
const BUDGET_OF_CLIENT: u64 = 4 << 20;
const GIB: usize = 1 << 30;

/// Measures whether faults cost more where there is more
#[derive(Debug, Parser)]
#[command(name = "fmalloc-scale")]
struct Options {
    /// Faults of each measurement, about
    #[arg(long, default_value_t = 30_000)]
    faults: usize,
    /// Runs, interleaved
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Draw the figures into this file
    #[arg(long)]
    svg: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What is made larger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Axis {
    Size,
    Clients,
    Regions,
}

impl Axis {
    fn name(self) -> &'static str {
        match self {
            Self::Size => "GiB of one region",
            Self::Clients => "clients",
            Self::Regions => "regions of one client",
        }
    }

    fn values(self) -> &'static [usize] {
        match self {
            Self::Size => &[1, 4, 16, 64, 256, 1024],
            Self::Clients => &[1, 4, 16, 64, 256],
            Self::Regions => &[1, 10, 100, 1000],
        }
    }
}

/// One point: microseconds per fault of each run.
struct Point {
    axis: Axis,
    value: usize,
    costs: Vec<f64>,
    /// Bytes that the daemon holds per page in use, and per 1,000 pages that were reserved and never touched.
    per_used: f64,
    per_reserved: f64,
}

fn connect(daemon: &Daemon, budget: u64) -> Result<Pager> {
    let options =
        ConnectOptions { socket: Some(daemon.socket()), budget: Some(budget), ..ConnectOptions::default() };
    Ok(Pager::connect_with(&options)?)
}

/// Memory to be touched.
struct Memory {
    pagers: Vec<Pager>,
    regions: Vec<Region>,
    /// Addresses of the pages.
    pages: Vec<*mut u64>,
    reserved: u64,
}

impl Memory {
    fn new(daemon: &Daemon, axis: Axis, value: usize) -> Result<Self> {
        let (clients, regions, size) = match axis {
            Axis::Size => (1, 1, value * GIB),
            Axis::Clients => (value, 1, GIB),
            Axis::Regions => (1, value, GIB / 16),
        };
        let (budget, pages) =
            if axis == Axis::Clients { (BUDGET_OF_CLIENT, PAGES_OF_CLIENT) } else { (BUDGET, PAGES) };
        let mut memory = Self { pagers: Vec::new(), regions: Vec::new(), pages: Vec::new(), reserved: 0 };
        for _ in 0..clients {
            let pager = connect(daemon, budget)?;
            for _ in 0..regions {
                let region = Region::sparse(&pager, size)?;
                memory.reserved += to_u64(size / PAGE_SIZE);
                for island in islands(size, (pages / regions).max(1)) {
                    region.commit(island.clone())?;
                    let first = region.as_ptr().wrapping_add(island.start);
                    memory.pages.extend(
                        (0..island.len() / PAGE_SIZE).map(|n| first.wrapping_add(n * PAGE_SIZE).cast()),
                    );
                }
                memory.regions.push(region);
            }
            memory.pagers.push(pager);
        }
        Ok(memory)
    }

    fn sum(&self, get: impl Fn(&fmalloc_client::ClientStats) -> u64) -> Result<u64> {
        let stats = self.pagers.iter().map(Pager::stats).collect::<Result<Vec<_>, _>>()?;
        Ok(stats.iter().map(get).sum())
    }

    /// Fills all pages, so that most of them are evicted.
    fn fill(&self) {
        for (n, page) in self.pages.iter().enumerate() {
            for word in 0..PAGE_SIZE / 8 {
                // SAFETY: the page is committed, and all of it is ours.
                unsafe { page.add(word).write(word_of(n)) };
            }
        }
    }

    /// Touches pages at random for about so many faults. Gives microseconds for each fault.
    fn touch(&self, faults: usize, rng: &mut Rng) -> Result<f64> {
        let (before, begin) = (self.sum(|stats| stats.faults)?, Instant::now());
        for _ in 0..faults {
            let n = rng.index(self.pages.len());
            // SAFETY: the page is committed, and nobody writes to it.
            let (first, last) = unsafe {
                (self.pages[n].read_volatile(), self.pages[n].add(PAGE_SIZE / 8 - 1).read_volatile())
            };
            ensure!((first, last) == (word_of(n), word_of(n)), "WRONG DATA in page {n}");
        }
        let taken = begin.elapsed().as_secs_f64() * 1e6;
        let faults = u32::try_from(self.sum(|stats| stats.faults)? - before)?;
        ensure!(faults > 0, "no fault at all");
        Ok(taken / f64::from(faults))
    }
}

fn word_of(page: usize) -> u64 {
    to_u64(page) << 1 | 1
}

/// Ranges of bytes that hold so many pages.
fn islands(size: usize, pages: usize) -> Vec<Range<usize>> {
    let island = pages.min(ISLAND);
    let count = pages / island;
    let step = size / count / PAGE_SIZE * PAGE_SIZE;
    (0..count).map(|n| n * step..n * step + island * PAGE_SIZE).collect()
}

fn main() -> Result<()> {
    let options = Options::parse();
    ensure!(options.runs > 0 && options.faults > 0, "nothing to measure");
    let daemon = Daemon::start_with("2G", "3G", &["--max-clients", "400", "--max-clients-per-uid", "400"])
        .context("no access to userfaultfd here")?;
    let mut points = Vec::new();
    for axis in [Axis::Size, Axis::Clients, Axis::Regions] {
        for value in axis.values() {
            points.push(Point { axis, value: *value, costs: Vec::new(), per_used: 0.0, per_reserved: 0.0 });
        }
    }
    for run in 0..options.runs {
        for point in &mut points {
            measure(&daemon, point, options.faults, to_u64(run))
                .with_context(|| format!("{} {}", point.value, point.axis.name()))?;
            eprintln!("run {}: {} {}: {:.1} µs", run + 1, point.value, point.axis.name(), point.costs[run]);
        }
    }
    points.iter_mut().for_each(|point| point.costs.sort_by(f64::total_cmp));
    if options.json {
        let rows: Vec<_> = points.iter().map(row).collect();
        println!("{}", json!(rows));
    } else {
        print(&points);
    }
    options.svg.map_or(Ok(()), |path| draw(&points, &path))
}

fn measure(daemon: &Daemon, point: &mut Point, faults: usize, seed: u64) -> Result<()> {
    let memory = Memory::new(daemon, point.axis, point.value)?;
    let held = |memory: &Memory| memory.sum(|stats| stats.overhead_bytes - stats.packed_bytes);
    let empty = held(&memory)?;
    memory.fill();
    let full = held(&memory)?;
    let mut rng = Rng::new(seed);
    // Once for nothing, so that all begin alike.
    memory.touch(faults / 4, &mut rng)?;
    point.costs.push(memory.touch(faults, &mut rng)?);
    // What an empty client takes is no page table.
    let idle = connect(daemon, memory.pagers[0].budget())?;
    let base = idle.stats()?.overhead_bytes * to_u64(memory.pagers.len());
    point.per_reserved = float(empty.saturating_sub(base)) / float(memory.reserved) * 1000.0;
    point.per_used = float(full - empty) / float(to_u64(memory.pages.len()));
    Ok(())
}

#[allow(clippy::cast_precision_loss, reason = "figures for a table")]
fn float(number: u64) -> f64 {
    number as f64
}

fn row(point: &Point) -> serde_json::Value {
    let costs = &point.costs;
    json!({
        "axis": point.axis.name(), "value": point.value, "unit": "µs per fault",
        "cost": { "min": costs[0], "median": costs[costs.len() / 2], "max": costs[costs.len() - 1] },
        "table_bytes_per_used_page": point.per_used,
        "table_bytes_per_1000_reserved_pages": point.per_reserved,
    })
}

fn print(points: &[Point]) {
    let mut table = comfy_table::Table::new();
    table.set_header(["", "", "µs per fault", "bytes per page in use", "bytes per 1,000 pages reserved"]);
    for point in points {
        let costs = &point.costs;
        let (least, most) = (costs[0], costs[costs.len() - 1]);
        table.add_row([
            point.value.to_string(),
            point.axis.name().to_owned(),
            format!("{:.1} ({least:.1} - {most:.1})", costs[costs.len() / 2]),
            format!("{:.1}", point.per_used),
            format!("{:.1}", point.per_reserved),
        ]);
    }
    println!("{table}");
}

/// Three panels, one for each axis: medians with their spread.
fn draw(points: &[Point], path: &std::path::Path) -> Result<()> {
    let area = SVGBackend::new(path, (960, 320)).into_drawing_area();
    area.fill(&WHITE)?;
    let most = points.iter().flat_map(|point| &point.costs).fold(0.0_f64, |most, cost| most.max(*cost));
    for (panel, axis) in area.split_evenly((1, 3)).iter().zip([Axis::Size, Axis::Clients, Axis::Regions]) {
        let of_axis: Vec<&Point> = points.iter().filter(|point| point.axis == axis).collect();
        let x = |point: &Point| float(to_u64(point.value));
        let end = of_axis.last().map_or(1.0, |point| x(point)) * 1.5;
        let mut chart = ChartBuilder::on(panel)
            .margin(10)
            .x_label_area_size(34)
            .y_label_area_size(44)
            .build_cartesian_2d((0.8..end).log_scale(), 0.0..most * 1.1)?;
        chart
            .configure_mesh()
            .x_desc(axis.name())
            .y_desc("µs per fault")
            .light_line_style(TRANSPARENT)
            .draw()?;
        let medians = of_axis.iter().map(|point| (x(point), point.costs[point.costs.len() / 2]));
        chart.draw_series(LineSeries::new(medians.clone(), &BLUE))?;
        chart.draw_series(medians.map(|at| Circle::new(at, 3, BLUE.filled())))?;
        chart.draw_series(of_axis.iter().map(|point| {
            let ends = [(x(point), point.costs[0]), (x(point), point.costs[point.costs.len() - 1])];
            PathElement::new(ends.to_vec(), BLUE)
        }))?;
    }
    area.present()?;
    Ok(())
}
