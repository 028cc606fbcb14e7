//! Log lines on stderr: with time and level for people, with the level as the journal's priority where stderr leads
//! there, which adds time and process by itself.

use std::fmt;
use std::io::{IsTerminal, stderr};
use std::os::unix::fs::MetadataExt;

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::{Format, Full, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, format};
use tracing_subscriber::registry::LookupSpan;

use crate::config::LogLevel;

/// Changes the level of a running log.
pub struct LevelSwitch(Box<dyn Fn(LogLevel) -> bool>);

impl LevelSwitch {
    /// Logs lines of this level and above from now on; false if the log is gone.
    pub(crate) fn set(&self, level: LogLevel) -> bool {
        (self.0)(level)
    }
}

impl fmt::Debug for LevelSwitch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LevelSwitch")
    }
}

/// Starts the log of this process. To be called once, before any thread is started.
#[must_use]
pub fn start(level: LogLevel) -> LevelSwitch {
    let lines = if is_journal() {
        Lines::Journal(format().with_target(false).with_level(false).without_time())
    } else {
        Lines::Plain(format().with_target(false))
    };
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter(level))
        .with_writer(stderr)
        .with_ansi(stderr().is_terminal())
        .event_format(lines)
        .with_filter_reloading();
    let handle = builder.reload_handle();
    builder.init();
    LevelSwitch(Box::new(move |level| handle.reload(filter(level)).is_ok()))
}

fn filter(level: LogLevel) -> EnvFilter {
    EnvFilter::new(level.to_string())
}

/// Whether stderr is the stream that systemd has connected to the journal.
fn is_journal() -> bool {
    let stream = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    std::fs::metadata("/proc/self/fd/2").is_ok_and(|meta| stream == format!("{}:{}", meta.dev(), meta.ino()))
}

enum Lines {
    Plain(Format<Full>),
    Journal(Format<Full, ()>),
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        match self {
            Self::Plain(format) => format.format_event(context, writer, event),
            Self::Journal(format) => {
                write!(writer, "<{}>", priority(*event.metadata().level()))?;
                format.format_event(context, writer, event)
            }
        }
    }
}

/// As syslog numbers them.
fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}
