//! Writes the man pages and shell completions of `fmallocd` and `fmallocctl`, from the definitions of their command
//! lines, into a directory: `manuals DIR`. `make install` and `make deb` install them from there.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::Context;
use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;

/// Ends every page of a program: other pages, and files it reads.
const FMALLOCD: &str = r#".SH FILES
.TP
.I /etc/fmalloc/fmallocd.toml
Settings: keys are the flags above with \fB_\fR for \fB\-\fR.
.TP
.I /run/fmalloc/fmallocd.sock
Socket of the service.
.TP
.I /var/lib/fmalloc/swap
Swap file of the service.
.SH SIGNALS
.TP
.B SIGHUP
Reads the settings again. Who may connect, limits, default and largest budget and the log level change at once, for
clients to come; what needs a restart is named in the log.
.TP
.BR SIGTERM ", " SIGINT
Takes no new clients and ends when no client holds memory. A second one ends at once; clients then wait for ever.
.SH EXIT STATUS
0 after an orderly end, 1 if it cannot serve, 2 if its settings cannot be used.
.SH SEE ALSO
.BR fmallocctl (1),
.BR userfaultfd (2)
"#;
const FMALLOCCTL: &str = r#".SH ENVIRONMENT
.TP
.B FMALLOC_SOCKET
The daemon's socket, unless \fB\-\-socket\fR names it.
.TP
.BR FMALLOC_DAEMON ", " FMALLOC_SWAP_DIR
What private daemons are started from and where they swap; \fBdoctor\fR looks at it.
.SH SEE ALSO
.BR fmallocctl (1),
.BR fmallocd (8)
"#;

fn main() -> anyhow::Result<()> {
    let dir = std::env::args_os().nth(1).context("usage: manuals DIR")?;
    let (man, completions) = (Path::new(&dir).join("man"), Path::new(&dir).join("completions"));
    for dir in [&man, &completions] {
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    let daemon = fmallocd::config::Cli::command();
    let ctl = fmallocd::ctl::Cli::command().disable_help_subcommand(true);
    for command in [&daemon, &ctl] {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            clap_complete::generate_to(shell, &mut command.clone(), command.get_name(), &completions)?;
        }
    }
    write_page(daemon, "8", FMALLOCD, &man)?;
    write_pages(ctl, &man)
}

/// The page of `fmallocctl` and one for each of its subcommands.
fn write_pages(mut command: Command, dir: &Path) -> anyhow::Result<()> {
    // Gives subcommands their full names and the global flags.
    command.build();
    for subcommand in command.get_subcommands() {
        write_page(subcommand.clone(), "1", FMALLOCCTL, dir)?;
    }
    write_page(command, "1", FMALLOCCTL, dir)
}

fn write_page(command: Command, section: &str, end: &str, dir: &Path) -> anyhow::Result<()> {
    let name = command.get_display_name().unwrap_or(command.get_name()).to_owned();
    // Exit codes and fields, in columns that must stay.
    let after = command.get_after_long_help().map(ToString::to_string);
    let has_subcommands = command.has_subcommands();
    let source = concat!("fmalloc ", env!("CARGO_PKG_VERSION"));
    let man = Man::new(command).section(section).manual("fmalloc").source(source);
    let path = dir.join(format!("{name}.{section}"));
    let mut file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    man.render_title(&mut file)?;
    man.render_name_section(&mut file)?;
    man.render_synopsis_section(&mut file)?;
    man.render_description_section(&mut file)?;
    man.render_options_section(&mut file)?;
    if has_subcommands {
        man.render_subcommands_section(&mut file)?;
    }
    if let Some(text) = after {
        write_as_is(&mut file, &text)?;
    }
    file.write_all(end.as_bytes())?;
    Ok(())
}

/// Sections from text whose headings end with a colon and whose other lines are indented.
fn write_as_is(out: &mut impl Write, text: &str) -> std::io::Result<()> {
    let escaped = |line: &str| line.replace('\\', "\\e").replace('-', "\\-").replace('\'', "\\(aq");
    for line in text.lines() {
        match line.strip_suffix(':') {
            Some(heading) if !line.starts_with(' ') => {
                writeln!(out, ".SH \"{}\"", escaped(&heading.to_uppercase()))?;
                writeln!(out, ".nf")?;
            }
            _ => writeln!(out, "{}", escaped(line))?,
        }
    }
    writeln!(out, ".fi")
}
