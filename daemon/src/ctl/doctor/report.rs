//! What the examination found: collected check by check, printed as text or as JSON.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::super::json::{Check, Doctor};

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// As it should be.
    Ok,
    /// Worth knowing.
    Note,
    /// Works, but at a price.
    Costs,
    /// One way to run fmalloc is closed by it.
    Blocks,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Costs => "costs",
            Self::Blocks => "blocks",
        }
    }
}

/// The findings so far.
#[derive(Debug, Default)]
pub(crate) struct Report {
    checks: Vec<Check>,
    /// The service would page this user's programs.
    pub(super) service: bool,
    /// A private daemon would.
    pub(super) private: bool,
    /// It would at least for programs that accept a user-mode userfaultfd.
    pub(super) private_user_mode: bool,
    /// The kernel has what both ways need.
    pub(super) kernel: bool,
    features: BTreeMap<&'static str, &'static str>,
    figures: BTreeMap<&'static str, u64>,
    area: &'static str,
}

impl Report {
    /// What follows belongs under this heading.
    pub(super) fn area(&mut self, name: &'static str) {
        self.area = name;
    }

    pub(super) fn ok(&mut self, check: &str, found: impl Into<String>) {
        self.add(check, State::Ok, found.into(), None, None);
    }

    pub(super) fn note(&mut self, check: &str, found: impl Into<String>) {
        self.add(check, State::Note, found.into(), None, None);
    }

    /// Something is missing: what that costs, and the command that mends it, if any does.
    pub(super) fn lacks(
        &mut self,
        check: &str,
        state: State,
        found: impl Into<String>,
        cost: impl Into<String>,
        mend: impl Into<String>,
    ) {
        self.add(check, state, found.into(), Some(cost.into()), Some(mend.into()));
    }

    pub(super) fn feature(&mut self, name: &'static str, answer: &'static str) {
        self.features.insert(name, answer);
    }

    pub(super) fn figure(&mut self, name: &'static str, value: u64) {
        self.figures.insert(name, value);
    }

    fn add(&mut self, check: &str, state: State, found: String, cost: Option<String>, mend: Option<String>) {
        let mend = mend.filter(|mend| !mend.is_empty());
        let (area, check, state) = (self.area.to_owned(), check.to_owned(), state.name().to_owned());
        self.checks.push(Check { area, check, state, found, cost, mend });
    }

    /// No way leads past what the kernel lacks.
    pub(super) fn conclude(&mut self) {
        self.service &= self.kernel;
        self.private &= self.kernel;
        self.private_user_mode &= self.kernel;
    }

    /// Whether an ordinary program can have its memory paged here.
    pub(crate) fn usable(&self) -> bool {
        self.service || self.private
    }

    pub(crate) fn json(&self) -> Doctor {
        Doctor {
            usable: self.usable(),
            service: self.service,
            private: self.private,
            private_user_mode: self.private_user_mode,
            features: self.features.clone(),
            figures: self.figures.clone(),
            checks: self.checks.clone(),
        }
    }

    pub(crate) fn text(&self) -> String {
        let mut out = String::new();
        let width = self.checks.iter().map(|check| check.check.chars().count()).max().unwrap_or(0);
        let mut area = "";
        for check in &self.checks {
            if check.area != area {
                area = &check.area;
                let gap = if out.is_empty() { "" } else { "\n" };
                let _ = writeln!(out, "{gap}{}", area.to_uppercase());
            }
            let state = if check.state == "blocks" { "BLOCKS" } else { &check.state };
            let _ = writeln!(out, "  {state:<6}  {:<width$}  {}", check.check, check.found);
            if let Some(cost) = &check.cost {
                let _ = writeln!(out, "            so:    {cost}");
            }
            if let Some(mend) = &check.mend {
                let _ = writeln!(out, "            mend:  {mend}");
            }
        }
        let _ = write!(out, "\n{}", self.verdict());
        out
    }

    fn verdict(&self) -> String {
        match (self.service, self.private) {
            (true, true) => "fmalloc can run here: with the service, and with private daemons.".to_owned(),
            (true, false) => "fmalloc can run here, with the service (Pager::connect).".to_owned(),
            (false, true) => "fmalloc can run here, with private daemons (Pager::private). No service.".to_owned(),
            (false, false) if self.private_user_mode => "fmalloc cannot run here but for programs that accept \
                 user_mode_only, in which system calls on swapped memory fail. Above, what blocks it is marked."
                .to_owned(),
            (false, false) => "fmalloc cannot run here. Above, what blocks it is marked.".to_owned(),
        }
    }
}

/// A command that needs root, as this user would type it.
pub(super) fn as_root(command: &str) -> String {
    if nix::unistd::geteuid().is_root() { command.to_owned() } else { format!("sudo {command}") }
}

/// Sets a sysctl now and for good.
pub(super) fn sysctl(setting: &str) -> String {
    let tee = as_root("tee /etc/sysctl.d/60-fmalloc.conf");
    format!("echo {setting} | {tee} && {}", as_root("sysctl --system"))
}
