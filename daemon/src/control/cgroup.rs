//! The memory limit of a client's control group, so that a client in a container does not get a budget by default that
//! would have the kernel kill it. A snapshot: a limit that changes later is the user's to follow by `fmallocctl limit`.

use std::fs::read_to_string;
use std::path::{Component, Path};

/// The least limit of memory on the process's groups in bytes, if there is one and it can be read from here.
pub(crate) fn memory_limit(pid: i32) -> Option<u64> {
    let groups = read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    limit_in(&groups, Path::new("/sys/fs/cgroup"))
}

/// `groups` is the text of /proc/PID/cgroup: `0::/path` for version 2, `N:memory,…:/path` for version 1.
fn limit_in(groups: &str, root: &Path) -> Option<u64> {
    let limits = groups.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (number, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        if number == "0" && controllers.is_empty() {
            let hybrid = root.join("unified");
            let mount = if hybrid.is_dir() { &hybrid } else { root };
            least(mount, path, "memory.max")
        } else if controllers.split(',').any(|name| name == "memory") {
            least(&root.join("memory"), path, "memory.limit_in_bytes")
        } else {
            None
        }
    });
    limits.min()
}

/// The least value of `file` from `path` up to the mount, as a parent's limit binds too.
fn least(mount: &Path, path: &str, file: &str) -> Option<u64> {
    let path = Path::new(path.trim_start_matches('/'));
    // A group outside the part of the tree that is visible here.
    if path.components().any(|part| part == Component::ParentDir) {
        return None;
    }
    let limit = |group: &Path| read_to_string(mount.join(group).join(file)).ok()?.trim().parse::<u64>().ok();
    // Version 1 writes "no limit" as a number just under 2^63.
    path.ancestors().filter_map(limit).filter(|limit| *limit < 1 << 60).min()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn version_2_takes_the_least_of_all_parents() {
        let root = tempfile::tempdir().unwrap();
        let leaf = root.path().join("pods/one");
        fs::create_dir_all(&leaf).unwrap();
        fs::write(leaf.join("memory.max"), "max\n").unwrap();
        assert_eq!(limit_in("0::/pods/one\n", root.path()), None);
        fs::write(root.path().join("pods/memory.max"), "1048576\n").unwrap();
        assert_eq!(limit_in("0::/pods/one\n", root.path()), Some(1 << 20));
        fs::write(leaf.join("memory.max"), "4096\n").unwrap();
        assert_eq!(limit_in("0::/pods/one\n", root.path()), Some(4096));
    }

    #[test]
    fn version_1_ignores_the_number_that_means_none() {
        let root = tempfile::tempdir().unwrap();
        let leaf = root.path().join("memory/docker");
        fs::create_dir_all(&leaf).unwrap();
        fs::write(leaf.join("memory.limit_in_bytes"), "9223372036854771712\n").unwrap();
        let groups = "5:cpu:/docker\n4:hugetlb,memory:/docker\n";
        assert_eq!(limit_in(groups, root.path()), None);
        fs::write(leaf.join("memory.limit_in_bytes"), "268435456\n").unwrap();
        assert_eq!(limit_in(groups, root.path()), Some(256 << 20));
    }

    #[test]
    fn path_outside_the_visible_tree_is_not_followed() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("memory.max"), "4096").unwrap();
        assert_eq!(limit_in("0::/../other\n", root.path()), None);
        assert_eq!(limit_in("", root.path()), None);
    }
}
