//! A client process for the end-to-end tests. Reads commands from stdin, one per line, and answers each with one line of
//! JSON. `start JOB COMMAND…` runs a command on a thread of its own; `stop JOB` asks it to end and waits, `finish JOB`
//! only waits. The commands are listed in [`run`].

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failure here is a failed test")]

mod abuse;
mod basic;
mod calls;
mod content;
mod endure;
mod files;
mod hostile;
mod kin;
mod life;
mod mappings;
mod meter;
mod pin;
mod state;

use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context, bail};
use fmalloc_client::Error;
use serde_json::{Value, json};

use state::{Args, State};

type Outcome = anyhow::Result<Value>;

struct Job {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Outcome>,
}

fn main() {
    serve(&Arc::new(State::default()), std::io::stdin().lock(), std::io::stdout());
}

/// Does what is told until there is no more. False if nobody takes the answers.
fn serve(state: &Arc<State>, commands: impl BufRead, mut answers: impl Write) -> bool {
    let mut jobs = HashMap::new();
    for line in commands.lines() {
        let Ok(line) = line else { return false };
        if line == "quit" {
            break;
        }
        let answer = match command(state, &mut jobs, &line) {
            Ok(value) => json!({ "ok": value }),
            Err(error) => json!({ "error": { "kind": kind(&error), "text": format!("{error:#}") } }),
        };
        if writeln!(answers, "{answer}").and_then(|()| answers.flush()).is_err() {
            return false;
        }
    }
    true
}

/// The variant of the library's error, for [`fmalloc_tests::worker::Failed`].
fn kind(error: &anyhow::Error) -> String {
    match error.downcast_ref::<Error>() {
        None => "Other".to_owned(),
        Some(Error::Refused { code, .. }) => format!("{code:?}"),
        Some(error) => {
            let name = format!("{error:?}");
            name.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default().to_owned()
        }
    }
}

fn command(state: &Arc<State>, jobs: &mut HashMap<String, Job>, line: &str) -> Outcome {
    let mut args = Args::new(line);
    let job = |jobs: &mut HashMap<String, Job>, name: &str| jobs.remove(name).context("no such job");
    match args.text()? {
        "start" => {
            let name = args.text()?.to_owned();
            let (state, stop, rest) = (Arc::clone(state), Arc::new(AtomicBool::new(false)), args.rest());
            let flag = Arc::clone(&stop);
            let thread = thread::spawn(move || {
                let mut args = Args::new(&rest);
                run(&state, args.text()?, &mut args, &flag)
            });
            jobs.insert(name, Job { stop, thread });
            Ok(Value::Null)
        }
        "finished" => {
            let job = jobs.get(args.text()?).context("no such job")?;
            Ok(job.thread.is_finished().into())
        }
        "stop" => {
            let job = job(jobs, args.text()?)?;
            job.stop.store(true, Ordering::Relaxed);
            job.thread.join().map_err(|_| anyhow::anyhow!("the job panicked"))?
        }
        "fork" => kin::make(state, &mut args),
        "finish" => {
            job(jobs, args.text()?)?.thread.join().map_err(|_| anyhow::anyhow!("the job panicked"))?
        }
        name => run(state, name, &mut args, &AtomicBool::new(false)),
    }
}

/// Does one thing. Sizes are bytes, with units if wanted.
fn run(state: &State, name: &str, args: &mut Args<'_>, stop: &AtomicBool) -> Outcome {
    match name {
        "connect" => basic::connect(state, args),
        "private" => basic::private(state, args),
        "disconnect" => basic::disconnect(state),
        "client" => Ok(state.pager()?.client_id().into()),
        "budget" => Ok(state.pager()?.budget().into()),
        "set-budget" => Ok(state.pager()?.set_budget(args.size()?)?.into()),
        "stats" => basic::stats(state),
        "health" => Ok(format!("{:?}", state.pager()?.health()).into()),
        "region" => basic::region(state, args),
        "sparse" => basic::sparse(state, args),
        "drop" => basic::drop_region(state, args),
        "commit" => basic::commit(state, args),
        "decommit" => basic::decommit(state, args),
        "advise" => basic::advise(state, args),
        "discard" => basic::discard(state, args),
        "resident" => basic::resident(state, args),

        "fill" => content::fill(state, args),
        "verify" => content::verify(state, args),
        "zeros" => content::zeros(state, args),
        "touch" => content::touch(state, args),
        "churn" => content::churn(state, args, stop),
        "press" => content::press(state, args, stop),

        "madvise" => mappings::advise(state, args),
        "munmap" => mappings::unmap(state, args),
        "mprotect" => mappings::protect(state, args),
        "mremap" => mappings::remap(state, args),
        "mlock" => mappings::lock(state, args),
        "wander" => mappings::wander(state, args),
        "mix" => mappings::mix(state, args),

        "map" => files::map(state, args),
        "map-fill" => files::fill(args),
        "map-verify" => files::verify(args),
        "map-read" => files::read(args),
        "map-flush" => files::flush(args),
        "map-rewrite" => files::rewrite(args),
        "map-drop" => files::unmap(args),

        "pipe-out" => calls::pipe_out(state, args),
        "pipe-in" => calls::pipe_in(state, args),
        "file-out" => calls::file_out(state, args),
        "file-in" => calls::file_in(state, args),
        "direct" => calls::direct(state, args),

        "endure" => endure::endure(state, args),

        "pin" => pin::pin(state, args),
        "pinned-in" => pin::read_in(state, args),
        "unpin" => pin::unpin(),

        "connect-inherit" => kin::connect(state, args),
        "private-inherit" => kin::private(state, args),
        "fork-raw" => kin::raw(state, args),
        "new-group" => kin::new_group(args),
        "group-stats" => kin::group_stats(args),
        "connect-group" => kin::join(state, args),
        "child-tell" => kin::order(state, args),
        "outlive" => kin::outlive(state, args),
        "nag" => kin::nag(state, stop),
        "fork-lost" => kin::lost(state, args),
        "child" => kin::tell(state, args),
        "child-wait" => kin::wait(state, args),
        "child-kill" => kin::end(state, args),
        "fork-exec" => kin::exec(state, args),
        "versions" => kin::versions(state, args),
        "write-versions" => kin::write_versions(state, args, stop),
        "check-versions" => kin::check_versions(state, args),

        "fork-touch" => life::fork_touch(state, args),
        "fork-calls" => life::fork_calls(state, args),
        "fork-own" => life::fork_own(),
        "fork-pause" => life::fork_pause(),
        "become" => life::become_user(args),
        "children" => life::children(),
        "exec-sleep" => life::exec_sleep(),
        "close-unknown" => life::close_unknown(),

        "meter" => meter::meter(state, args, stop),
        "usurp" => abuse::usurp(state, args),
        "slow-discard" => abuse::slow_discard(state, args),
        "fork-storm" => abuse::fork_storm(args),
        "hold-stderr" => abuse::hold_stderr(state, args),
        "twins" => abuse::twins(state, args),
        "pagers" => abuse::pagers(args),

        "hostile" => hostile::run(args),
        _ => bail!("no command {name:?}"),
    }
}
