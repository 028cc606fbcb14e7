//! What this user may do, and what the container or sandbox around it takes away.

use std::fs::read_to_string;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use fmalloc_proto::size::Size;
use nix::errno::Errno;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use nix::unistd::{Gid, Group, User, getegid, geteuid, getgroups};

use super::report::{Report, State, as_root, sysctl};
use super::uffd::Access;
use crate::service::memory::has_capability;

/// The group that the packages make.
pub(super) const GROUP: &str = "fmalloc";
const DEVICE: &str = "/dev/userfaultfd";
const CAP_SYS_PTRACE: u32 = 19;
/// Where the packages and `make install` put the rule that gives the device to the group.
const RULES: [&str; 4] = [
    "/usr/lib/udev/rules.d/60-fmalloc.rules",
    "/lib/udev/rules.d/60-fmalloc.rules",
    "/usr/local/lib/udev/rules.d/60-fmalloc.rules",
    "/etc/udev/rules.d/60-fmalloc.rules",
];

pub(super) fn examine(report: &mut Report, access: &Access) {
    report.area("permissions");
    user(report);
    device(report, access);
    call(report, access);
    surroundings(report);
    limits(report);
}

/// The name of this process's user, or its number.
fn user_name() -> String {
    let uid = geteuid();
    User::from_uid(uid).ok().flatten().map_or_else(|| uid.to_string(), |user| user.name)
}

/// Whether this process has the group among its own.
pub(super) fn in_group(gid: Gid) -> bool {
    getegid() == gid || getgroups().is_ok_and(|groups| groups.contains(&gid))
}

fn user(report: &mut Report) {
    let name = user_name();
    match Group::from_name(GROUP) {
        Ok(Some(group)) if in_group(group.gid) => report.ok("user", format!("{name}, in group {GROUP}")),
        Ok(Some(group)) if group.mem.contains(&name) => report.note(
            "user",
            format!("{name}, in group {GROUP} as of the next login; until then `sg {GROUP} COMMAND`"),
        ),
        Ok(Some(_)) => report.note("user", format!("{name}, not in group {GROUP}")),
        _ => report.note("user", format!("{name}; there is no group {GROUP}, which the package makes")),
    }
}

/// The command by which this user joins the group, which exists or not.
pub(super) fn join_group() -> String {
    let name = user_name();
    let join = format!("{}   # then log in again", as_root(&format!("usermod -aG {GROUP} {name}")));
    match Group::from_name(GROUP) {
        Ok(Some(group)) if group.mem.contains(&name) => format!("log in again, or: sg {GROUP} COMMAND"),
        Ok(Some(_)) => join,
        _ => format!("{} && {join}", as_root(&format!("groupadd --system {GROUP}"))),
    }
}

fn device(report: &mut Report, access: &Access) {
    let error = match &access.device {
        Ok(_) => return report.ok(DEVICE, "can be opened"),
        Err(errno) => *errno,
    };
    // The price is paid by private daemons only, and where the system call serves, by none.
    let state = if access.own() { State::Note } else { State::Blocks };
    let cost = if access.own() {
        "nothing, since the system call is allowed"
    } else {
        "no private daemon for this user; the service passes the device to its clients"
    };
    let found = match std::fs::metadata(DEVICE) {
        Ok(meta) => {
            let group = Group::from_gid(Gid::from_raw(meta.gid())).ok().flatten();
            let group = group.map_or_else(|| meta.gid().to_string(), |group| group.name);
            format!("{}; it has mode {:04o} and group {group}", error.desc(), meta.mode() & 0o777)
        }
        Err(_) => error.desc().to_owned(),
    };
    let mend = match error {
        Errno::ENOENT | Errno::EPERM if is_container() => {
            "pass it to the container: --device /dev/userfaultfd".to_owned()
        }
        // The kernel is older than the device.
        Errno::ENOENT => sysctl("vm.unprivileged_userfaultfd=1"),
        _ => give_device(),
    };
    report.lacks(DEVICE, state, found, cost, mend);
}

/// The commands that give this user the device.
fn give_device() -> String {
    let ours = Group::from_name(GROUP).ok().flatten().map(|group| group.gid.as_raw());
    let belongs =
        std::fs::metadata(DEVICE).is_ok_and(|meta| Some(meta.gid()) == ours && meta.mode() & 0o060 == 0o060);
    if belongs {
        return join_group();
    }
    let join = join_group();
    let first = join.split("   #").next().unwrap_or_default();
    if !Path::new("/run/udev/control").exists() {
        let (chgrp, chmod) =
            (as_root("chgrp fmalloc /dev/userfaultfd"), as_root("chmod 0660 /dev/userfaultfd"));
        return format!("{first} && {chgrp} && {chmod}   # then log in again");
    }
    let trigger = as_root("udevadm trigger --subsystem-match=misc --sysname-match=userfaultfd");
    let reload = as_root("udevadm control --reload");
    if RULES.iter().any(|rule| Path::new(rule).exists()) {
        return format!("{reload} && {trigger} && {join}");
    }
    let rule = r#"echo 'KERNEL=="userfaultfd", SUBSYSTEM=="misc", GROUP="fmalloc", MODE="0660"'"#;
    let tee = as_root("tee /etc/udev/rules.d/60-fmalloc.rules");
    format!("{first} && {rule} | {tee} && {reload} && {trigger}   # then log in again")
}

fn call(report: &mut Report, access: &Access) {
    match (&access.call, &access.user_mode) {
        (Ok(()), _) => report.ok("userfaultfd(2)", "allowed, for faults of the kernel too"),
        (Err(_), Ok(())) => {
            let found = "allowed for faults of programs only (vm.unprivileged_userfaultfd=0)";
            if access.full() {
                report.note("userfaultfd(2)", format!("{found}; the device serves instead"));
            } else {
                let cost = "no private daemon, but for programs that accept user_mode_only, in which system calls on \
                            swapped memory fail";
                report.lacks(
                    "userfaultfd(2)",
                    State::Blocks,
                    found,
                    cost,
                    sysctl("vm.unprivileged_userfaultfd=1"),
                );
            }
        }
        (Err(errno), Err(_)) if access.full() => {
            report.note("userfaultfd(2)", format!("{}; the device serves instead", errno.desc()));
        }
        (Err(errno), Err(_)) => {
            let mend = if is_filtered() { relax_filter() } else { "install Linux 4.14 or newer".to_owned() };
            let cost = "no userfaultfd at all without the service";
            report.lacks("userfaultfd(2)", State::Blocks, errno.desc(), cost, mend);
        }
    }
}

fn surroundings(report: &mut Report) {
    let mut found = Vec::new();
    if is_container() {
        found.push("in a container");
    }
    if is_filtered() {
        found.push("system calls are filtered (seccomp)");
    }
    if read_to_string("/proc/self/uid_map")
        .is_ok_and(|map| map.split_whitespace().collect::<Vec<_>>() != ["0", "0", "4294967295"])
    {
        found.push("in a user namespace, where capabilities do not count for userfaultfd");
    }
    if found.is_empty() {
        report.ok("sandbox", "none: no container, no system call filter, no user namespace");
    } else {
        report.note("sandbox", found.join("; "));
    }
    match has_capability(CAP_SYS_PTRACE) {
        true => report.ok("CAP_SYS_PTRACE", "in effect"),
        false => report.note("CAP_SYS_PTRACE", "not in effect; the service's own is what counts"),
    }
}

/// Limits of the shell that programs started from it get too.
fn limits(report: &mut Report) {
    if let Ok((soft, _)) = getrlimit(Resource::RLIMIT_AS)
        && soft != RLIM_INFINITY
    {
        let cost = "all memory of a program, regions included, must fit into that many addresses";
        report.lacks("ulimit -v", State::Costs, Size(soft).to_string(), cost, "ulimit -v unlimited");
    }
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
    let limit = if hard == RLIM_INFINITY { "unlimited".to_owned() } else { hard.to_string() };
    report.ok(
        "ulimit -n",
        format!("{soft}, can be raised to {limit}; fmallocd raises its own, and needs about 12 a client"),
    );
    let Ok((soft, _)) = getrlimit(Resource::RLIMIT_MEMLOCK) else { return };
    if soft == RLIM_INFINITY || has_capability(14) {
        report.ok("ulimit -l", "a daemon of this user can lock its memory");
    } else {
        let size = Size(soft);
        report.note(
            "ulimit -l",
            format!("{size}: a private daemon's own memory can be swapped out by the kernel"),
        );
    }
}

/// Whether a seccomp filter is in force.
pub(super) fn is_filtered() -> bool {
    let status = read_to_string("/proc/thread-self/status").unwrap_or_default();
    status.lines().filter_map(|line| line.strip_prefix("Seccomp:")).any(|mode| mode.trim() == "2")
}

/// How a container gets the system calls that its filter takes away.
pub(super) fn relax_filter() -> String {
    if is_container() {
        "use the service of the host: -v /run/fmalloc:/run/fmalloc --device /dev/userfaultfd; or allow \
         userfaultfd, close_range, pidfd_open and io_uring_* in the container's profile: --security-opt seccomp=PROFILE"
            .to_owned()
    } else {
        "allow userfaultfd, close_range, pidfd_open and io_uring_* in the filter, as \
         SystemCallFilter=@system-service io_uring_setup io_uring_enter io_uring_register does in a unit"
            .to_owned()
    }
}

/// Whether this looks like the inside of a container.
pub(super) fn is_container() -> bool {
    ["/.dockerenv", "/run/.containerenv", "/run/systemd/container"]
        .iter()
        .any(|file| Path::new(file).exists())
        || std::env::var_os("container").is_some_and(|value| !value.is_empty())
}
