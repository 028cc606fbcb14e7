//! SIGHUP: the configuration is read again, what can change while clients are served does, and the rest is named.

use super::log::LevelSwitch;
use crate::config::{Cli, Config, ConfigError, Mode, Settings};

/// Where a running daemon's configuration came from.
#[derive(Debug)]
pub struct Reloader {
    /// The command line: its flags still win over the file.
    pub cli: Cli,
    /// The log.
    pub level: LevelSwitch,
}

/// What a reload comes to.
#[derive(Debug)]
pub(crate) struct Reloaded {
    /// What is in effect from now on.
    pub(crate) config: Config,
    /// Keys that have changed.
    pub(crate) changed: Vec<&'static str>,
    /// Keys that differ, but can only change by a restart.
    pub(crate) later: Vec<&'static str>,
}

impl Reloader {
    /// Reads again, and changes the log level.
    ///
    /// # Errors
    /// Those of [`Config::load`]; nothing has changed then.
    pub(crate) fn reload(&self, running: &Config) -> Result<Reloaded, ConfigError> {
        let reloaded = merge(running, Config::load(&self.cli)?);
        self.level.set(reloaded.config.log_level);
        Ok(reloaded)
    }
}

/// The running configuration with what can change live taken from `new`.
fn merge(running: &Config, new: Config) -> Reloaded {
    let (changed, mut later) = compare(&running.written, &new.written);
    if later.is_empty() && socket_mode(running) != socket_mode(&new) {
        later.push("socket_mode");
    }
    let mut config = running.clone();
    // What follows from a pool that is not there yet must not exceed the one that is.
    config.max_budget = new.max_budget.min(running.pool);
    config.default_budget = new.default_budget.min(config.max_budget);
    config.limits = new.limits;
    config.log_level = new.log_level;
    if let (Mode::Service(old), Mode::Service(new)) = (&mut config.mode, new.mode) {
        old.allow_uids = new.allow_uids;
        old.allow_gids = new.allow_gids;
    }
    config.written = Settings {
        socket: running.written.socket.clone(),
        socket_mode: running.written.socket_mode,
        swap: running.written.swap.clone(),
        swap_size: running.written.swap_size,
        ram: running.written.ram,
        no_io_uring: running.written.no_io_uring,
        no_poison: running.written.no_poison,
        ..new.written
    };
    Reloaded { config, changed, later }
}

/// The mode that follows from who is allowed, unless it was set.
fn socket_mode(config: &Config) -> Option<u32> {
    match &config.mode {
        Mode::Service(service) => Some(service.socket_mode.0),
        Mode::Private(_) => None,
    }
}

/// Keys that differ: those that can change live, and the others.
fn compare(old: &Settings, new: &Settings) -> (Vec<&'static str>, Vec<&'static str>) {
    let (mut changed, mut later) = (Vec::new(), Vec::new());
    macro_rules! differing {
        ($list:ident: $($key:ident)*) => {
            $(if old.$key != new.$key { $list.push(stringify!($key)); })*
        };
    }
    differing!(changed: allow_uid allow_gid default_budget max_budget max_clients max_clients_per_uid max_regions
        max_connections log_level);
    differing!(later: socket socket_mode swap swap_size ram no_io_uring no_poison);
    (changed, later)
}
