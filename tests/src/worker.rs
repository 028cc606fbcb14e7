//! A client process, told line by line what to do. Its answers are one line of JSON each: `{"ok": …}` or
//! `{"error": {"kind", "text"}}`. What it can do is in the binary `fmalloc-worker`.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{PATIENCE, daemon, process};

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// A client process; killed when the value is dropped.
#[derive(Debug)]
pub struct Worker {
    child: Child,
    input: ChildStdin,
    answers: Receiver<String>,
    stderr: PathBuf,
    socket: PathBuf,
}

/// Why a worker could not do what it was told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failed {
    /// The variant of `fmalloc_client::Error`, with its code for `Refused`; `Other` for other errors.
    pub kind: String,
    /// For people.
    pub text: String,
}

impl Worker {
    /// Starts the process for the daemon in `dir`, with more environment variables, as another user if `uid` is given.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start(dir: &Path, binary: &Path, uid: Option<u32>, variables: &[(&str, &str)]) -> Self {
        let stderr = dir.join(format!("stderr-{}", NUMBER.fetch_add(1, Ordering::Relaxed)));
        let socket = dir.join("socket");
        let mut command = Command::new(binary);
        for name in ["FMALLOC_DAEMON", "FMALLOC_DAEMON_LOG", "FMALLOC_SWAP_DIR", "XDG_RUNTIME_DIR"] {
            command.env_remove(name);
        }
        command.env("FMALLOC_SOCKET", &socket).envs(variables.iter().copied()).current_dir("/");
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command.stderr(File::create(&stderr).expect("a file for stderr"));
        if let Some(uid) = uid {
            command.uid(uid).gid(uid);
        }
        let mut child = process::end_with_us(&mut command).spawn().expect("a worker");
        let input = child.stdin.take().expect("a pipe");
        let output = BufReader::new(child.stdout.take().expect("a pipe"));
        let (sender, answers) = channel();
        // Ends with the process.
        std::thread::spawn(move || {
            output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        Self { child, input, answers, stderr, socket }
    }

    /// Tells it to do something; its answer is to be taken by [`Worker::answer`].
    ///
    /// # Panics
    /// If it has ended.
    pub fn tell(&mut self, command: &str) {
        writeln!(self.input, "{command}")
            .unwrap_or_else(|error| panic!("{command}: {error}\n{}", self.stderr()));
    }

    /// The next answer, if it comes within this time.
    ///
    /// # Errors
    /// Why the worker could not do it.
    ///
    /// # Panics
    /// If the worker has ended.
    pub fn answer(&mut self, patience: Duration) -> Option<Result<Value, Failed>> {
        let line = match self.answers.recv_timeout(patience) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => return None,
            Err(RecvTimeoutError::Disconnected) => {
                let ended = process::wait(&mut self.child, Duration::from_secs(1));
                panic!("the worker ended: {ended:?}\n{}", self.stderr());
            }
        };
        let mut answer: Value = serde_json::from_str(&line).unwrap_or_else(|_| panic!("no JSON: {line}"));
        Some(match answer.get_mut("ok") {
            Some(value) => Ok(value.take()),
            None => {
                let text = |field: &str| answer["error"][field].as_str().unwrap_or_default().to_owned();
                Err(Failed { kind: text("kind"), text: text("text") })
            }
        })
    }

    /// Tells it to do something and waits until it has.
    ///
    /// # Errors
    /// Why it could not.
    ///
    /// # Panics
    /// If it takes too long, or has ended.
    pub fn try_ask(&mut self, command: &str) -> Result<Value, Failed> {
        self.tell(command);
        self.answer(PATIENCE).unwrap_or_else(|| self.hangs(command))
    }

    /// [`Worker::try_ask`] for what must succeed.
    ///
    /// # Panics
    /// If it does not.
    pub fn ask(&mut self, command: &str) -> Value {
        self.try_ask(command).unwrap_or_else(|failed| panic!("{command}: {failed:?}\n{}", self.stderr()))
    }

    /// [`Worker::try_ask`] for what must fail.
    ///
    /// # Panics
    /// If it does not.
    pub fn refused(&mut self, command: &str) -> Failed {
        match self.try_ask(command) {
            Ok(value) => panic!("{command} succeeded: {value}"),
            Err(failed) => failed,
        }
    }

    /// Tells it to do what it does not survive, and gives how it ended.
    ///
    /// # Panics
    /// If it survives.
    pub fn dies(&mut self, command: &str) -> ExitStatus {
        self.tell(command);
        self.wait()
    }

    /// The number of its client.
    ///
    /// # Panics
    /// If it is not connected.
    pub fn client(&mut self) -> u64 {
        self.ask("client").as_u64().expect("a number")
    }

    /// A field of its statistics.
    pub fn stats(&mut self, field: &str) -> u64 {
        daemon::number(&self.ask("stats"), field)
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it wrote to stderr.
    #[must_use]
    pub fn stderr(&self) -> String {
        fs::read_to_string(&self.stderr).unwrap_or_default()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        process::signal(&self.child, signal);
    }

    /// Kills it and waits until it is gone.
    pub fn kill(&mut self) -> ExitStatus {
        self.signal(Signal::SIGKILL);
        self.wait()
    }

    /// Ends it in an orderly way.
    ///
    /// # Panics
    /// If it does not end well.
    pub fn quit(mut self) {
        self.tell("quit");
        let status = self.wait();
        assert!(status.success(), "the worker ended with {status}\n{}", self.stderr());
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// If it does not end.
    pub fn wait(&mut self) -> ExitStatus {
        process::wait(&mut self.child, PATIENCE).unwrap_or_else(|| self.hangs("to end"))
    }

    fn hangs(&self, command: &str) -> ! {
        let clients = daemon::ctl(&self.socket, &["--json", "clients"]);
        panic!(
            "no answer within {PATIENCE:?}: {command}\n{}--- its threads\n{}--- clients\n{}{}",
            self.stderr(),
            process::threads(self.pid()),
            String::from_utf8_lossy(&clients.stdout),
            String::from_utf8_lossy(&clients.stderr)
        );
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
