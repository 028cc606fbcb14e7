//! Progress and live figures, drawn by the main thread while another works: a bar on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use fmalloc_client::{Health, Pager};
use fmalloc_proto::size::Size;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

const DRAW: Duration = Duration::from_millis(100);
const FIGURES: Duration = Duration::from_millis(500);
const PLAIN: Duration = Duration::from_secs(5);

/// Shows what goes on.
pub(crate) struct Show<'a> {
    pager: &'a Pager,
    start: Instant,
    terminal: bool,
}

impl<'a> Show<'a> {
    /// Takes its figures from `pager`.
    pub(crate) fn new(pager: &'a Pager) -> Self {
        Self { pager, start: Instant::now(), terminal: std::io::stderr().is_terminal() }
    }

    /// Runs `work`, which counts up its argument towards `total`, on a thread and shows how far it is.
    pub(crate) fn phase<R: Send>(
        &self,
        name: &'static str,
        total: u64,
        work: impl FnOnce(&AtomicU64) -> Result<R> + Send,
    ) -> Result<R> {
        let bar = if self.terminal {
            ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr())
        } else {
            ProgressBar::hidden()
        };
        let style = ProgressStyle::with_template(
            "{prefix:9} {wide_bar} {percent:>3}% {bytes_per_sec:>13} {elapsed:>4}\n          {msg}",
        )?;
        bar.set_style(style);
        bar.set_prefix(name);
        let done = AtomicU64::new(0);
        let (mut figures, mut plain) = (Instant::now(), Instant::now());
        let result = thread::scope(|scope| {
            let main = thread::current();
            let done = &done;
            let worker = scope.spawn(move || {
                let result = work(done);
                main.unpark();
                result
            });
            bar.set_message(self.figures());
            while !worker.is_finished() {
                thread::park_timeout(DRAW);
                bar.set_position(done.load(Ordering::Relaxed));
                if figures.elapsed() >= FIGURES {
                    figures = Instant::now();
                    self.check_health();
                    bar.set_message(self.figures());
                }
                if !self.terminal && plain.elapsed() >= PLAIN {
                    plain = Instant::now();
                    self.line(name, done.load(Ordering::Relaxed), total);
                }
            }
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        if result.is_ok() {
            bar.set_position(total);
            bar.set_message(self.figures());
            bar.finish();
            if !self.terminal {
                self.line(name, total, total);
            }
        }
        result
    }

    fn line(&self, name: &str, done: u64, total: u64) {
        let percent = (done * 100).checked_div(total).unwrap_or(100);
        let seconds = self.start.elapsed().as_secs();
        eprintln!("{seconds:>4} s  {name:9} {percent:>3}%, {}", self.figures());
    }

    fn figures(&self) -> String {
        let Ok(stats) = self.pager.stats() else { return "fmallocd does not answer".to_owned() };
        let [resident, pages_in, pages_out] =
            [stats.resident_pages, stats.pages_in, stats.pages_out].map(|pages| Size(pages << 12));
        format!("resident {resident}, {} faults, in {pages_in}, out {pages_out}", stats.faults)
    }

    /// Without its daemon the program would wait for ever at the next fault.
    fn check_health(&self) {
        let health = self.pager.health();
        if health != Health::Ok {
            eprintln!("sort_lines: fmallocd no longer serves this process ({health:?}); giving up");
            std::process::exit(1);
        }
    }
}
