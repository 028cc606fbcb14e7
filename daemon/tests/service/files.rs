//! Unit files, installation, man pages and the package.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::support::{FMALLOCD, has, is_root, place, project, succeed};

/// The units, naming the program under test.
fn units(dir: &Path) -> [PathBuf; 2] {
    ["fmallocd.service", "fmallocd.socket"].map(|name| {
        let text = fs::read_to_string(project().join("systemd").join(name)).unwrap();
        let path = dir.join(name);
        fs::write(&path, text.replace("/usr/bin/fmallocd", FMALLOCD)).unwrap();
        path
    })
}

#[test]
fn unit_files_are_sound() {
    if !has("systemd-analyze", "systemd") {
        return;
    }
    let place = place();
    let output =
        succeed(Command::new("systemd-analyze").args(["verify", "--man=no"]).args(units(place.path())));
    // Unknown settings are only warned of. What else is installed here is not our affair.
    let warnings = String::from_utf8_lossy(&output.stderr);
    assert!(!warnings.contains("fmallocd"), "{warnings}");
}

#[test]
fn service_is_hardened() {
    if !has("systemd-analyze", "systemd") {
        return;
    }
    let place = place();
    let [service, _] = units(place.path());
    // Tenths: an exposure of 3.0 or more fails.
    let threshold = ["security", "--no-pager", "--offline=true", "--threshold=30"];
    succeed(Command::new("systemd-analyze").args(threshold).arg(service));
}

#[test]
fn default_configuration_is_valid_with_every_key_that_it_shows() {
    let place = place();
    let text = fs::read_to_string(project().join("systemd/fmallocd.toml")).unwrap();
    // Settings that are commented out are lines like `#key = value`; prose has a space after the mark.
    let shown: String = text
        .lines()
        .map(|line| {
            line.strip_prefix('#').filter(|rest| !rest.is_empty() && !rest.starts_with(' ')).unwrap_or(line)
        })
        .map(|line| format!("{line}\n"))
        .collect();
    let shown = shown
        .replace("\"fmalloc\"", "\"root\"")
        .replace("32GiB", "1MiB")
        .replace("/var/lib/fmalloc", place.path().to_str().unwrap())
        .replace("/run/fmalloc", place.path().to_str().unwrap());
    let file = place.path().join("fmallocd.toml");
    fs::write(&file, &shown).unwrap();
    let output = succeed(Command::new(FMALLOCD).arg("--check").arg("--config").arg(&file));
    let effective = String::from_utf8(output.stdout).unwrap();
    let key = |line: &str| line.split(" = ").next().unwrap().to_owned();
    let keys = |text: &str| -> BTreeSet<String> {
        text.lines().filter(|line| line.contains(" = ") && !line.starts_with('#')).map(key).collect()
    };
    assert_eq!(keys(&shown), keys(&effective));
}

/// All files below a directory, by their names within it.
fn tree(dir: &Path) -> BTreeSet<String> {
    let output = succeed(Command::new("find").arg(dir).args(["-type", "f", "-printf", "%m /%P\\n"]));
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

/// Where cargo has put the programs.
fn built() -> &'static Path {
    Path::new(FMALLOCD).parent().unwrap()
}

fn make(target: &str, dest: &Path) {
    let mut command = Command::new("make");
    command.args(["--no-print-directory", "-C"]).arg(project()).arg(target);
    succeed(command.arg(format!("DESTDIR={}", dest.display())).arg("PREFIX=/opt/fm").env("BUILT", built()));
}

#[test]
fn installation_puts_everything_in_its_place_and_takes_it_away_again() {
    let place = place();
    make("install", place.path());
    let installed = tree(place.path());
    for file in [
        "755 /opt/fm/bin/fmallocd",
        "755 /opt/fm/bin/fmallocctl",
        "644 /etc/fmalloc/fmallocd.toml",
        "644 /opt/fm/lib/systemd/system/fmallocd.service",
        "644 /opt/fm/lib/systemd/system/fmallocd.socket",
        "644 /opt/fm/lib/sysusers.d/fmalloc.conf",
        "644 /opt/fm/lib/tmpfiles.d/fmalloc.conf",
        "644 /opt/fm/lib/udev/rules.d/60-fmalloc.rules",
        "755 /opt/fm/lib/fmalloc/libfmalloc_preload.so",
        "644 /opt/fm/lib/libfmalloc.so",
        "644 /opt/fm/lib/libfmalloc.a",
        "644 /opt/fm/lib/pkgconfig/fmalloc.pc",
        "644 /opt/fm/lib/python3/dist-packages/fmalloc.py",
        "644 /opt/fm/include/fmalloc.h",
        "644 /opt/fm/share/man/man8/fmallocd.8",
        "644 /opt/fm/share/man/man1/fmallocctl.1",
        "644 /opt/fm/share/man/man1/fmallocctl-doctor.1",
        "644 /opt/fm/share/bash-completion/completions/fmallocctl",
        "644 /opt/fm/share/zsh/site-functions/_fmallocctl",
        "644 /opt/fm/share/fish/vendor_completions.d/fmallocctl.fish",
    ] {
        assert!(installed.contains(file), "{file}: {installed:#?}");
    }
    // Nothing else but a page for each subcommand.
    let pages = installed.iter().filter(|file| file.contains("/man/man1/fmallocctl-")).count();
    assert_eq!(installed.len() - pages, 2 + 1 + 5 + 6 + 2 + 6, "{installed:#?}");
    let unit = fs::read_to_string(place.path().join("opt/fm/lib/systemd/system/fmallocd.service")).unwrap();
    assert!(unit.contains("ExecStart=/opt/fm/bin/fmallocd") && !unit.contains("/usr/bin"), "{unit}");

    // A configuration that was changed is neither overwritten nor removed.
    let config = place.path().join("etc/fmalloc/fmallocd.toml");
    fs::write(&config, "ram = '1G'\n").unwrap();
    make("install", place.path());
    make("uninstall", place.path());
    assert_eq!(tree(place.path()), BTreeSet::from(["644 /etc/fmalloc/fmallocd.toml".to_owned()]));
    assert_eq!(fs::read_to_string(&config).unwrap(), "ram = '1G'\n");
    fs::remove_file(&config).unwrap();
    make("install", place.path());
    make("uninstall", place.path());
    assert_eq!(tree(place.path()), BTreeSet::new());
}

#[test]
fn man_pages_are_sound_and_cover_every_option() {
    let place = place();
    succeed(Command::new(built().join("examples/manuals")).arg(place.path()));
    let page =
        |name: &str| fs::read_to_string(place.path().join("man").join(name)).unwrap().replace("\\-", "-");
    let options = |program: &str| -> Vec<String> {
        let help = succeed(Command::new(built().join(program)).arg("--help")).stdout;
        let help = String::from_utf8(help).unwrap();
        let word =
            |line: &str| line.split_whitespace().find(|word| word.starts_with("--")).map(str::to_owned);
        help.lines().filter(|line| line.trim_start().starts_with('-')).filter_map(word).collect()
    };
    for (program, name) in [("fmallocd", "fmallocd.8"), ("fmallocctl", "fmallocctl.1")] {
        let (page, options) = (page(name), options(program));
        assert!(options.len() > 3, "{options:?}");
        for option in options {
            assert!(page.contains(&option), "{name} lacks {option}");
        }
    }
    assert!(page("fmallocctl.1").contains("evicted_bytes"));
    if has("man", "man-db") {
        for file in fs::read_dir(place.path().join("man")).unwrap() {
            let output = succeed(Command::new("man").args(["--warnings", "-l"]).arg(file.unwrap().path()));
            assert!(output.stderr.is_empty(), "{output:?}");
        }
    }
    if has("bash", "bash") {
        succeed(Command::new("bash").arg("-n").arg(place.path().join("completions/fmallocctl.bash")));
    }
}

#[test]
fn package_installs_starts_and_purges_cleanly() {
    if !(is_root() && has("dh", "debhelper") && has("systemd-nspawn", "systemd-container")) {
        return;
    }
    let place = place();
    let debs = place.path().join("deb");
    let script = |name: &str| project().join("systemd").join(name);
    let mut make = Command::new(script("make-deb"));
    // Symbols of an unoptimised build are large, and not what is tested.
    make.env("BUILT", built()).env("DEB_DIR", &debs).env("DEB_BUILD_OPTIONS", "noautodbgsym");
    succeed(&mut make);
    let start = concat!("fmalloc_", env!("CARGO_PKG_VERSION"), "_");
    let is_package = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_str().unwrap();
        name.starts_with(start) && name.ends_with(".deb")
    };
    let package = fs::read_dir(&debs).unwrap().map(|entry| entry.unwrap().path()).find(is_package).unwrap();
    let output = Command::new(script("test-package")).arg(package).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    match output.status.code() {
        Some(0) => {}
        // No nested containers here, which no package mends.
        Some(77) => eprintln!("skipped: {said}"),
        _ => panic!("{said}{}", String::from_utf8_lossy(&output.stdout)),
    }
}
