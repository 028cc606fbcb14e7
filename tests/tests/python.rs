//! The Python module: its own tests, with this machine's Python and numpy from PyPI in a virtual environment that is kept
//! for the next time.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failure here is a failed test")]

use std::path::{Path, PathBuf};
use std::process::Command;

use fmalloc_tests::place;

const NUMPY: &str = "numpy>=1.26,<3";

/// A directory outside of the sources that is still there next time.
fn cache() -> PathBuf {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")));
    base.unwrap_or_else(std::env::temp_dir).join("fmalloc-tests")
}

/// The Python of an environment with numpy; none, after saying why, if there is none to be had.
fn python() -> Option<PathBuf> {
    let venv = cache().join("python");
    let python = venv.join("bin/python");
    let has_numpy =
        || Command::new(&python).args(["-c", "import numpy"]).output().is_ok_and(|run| run.status.success());
    if has_numpy() {
        return Some(python);
    }
    let step = |command: &mut Command| match command.output() {
        Ok(output) if output.status.success() => true,
        Ok(output) => {
            eprintln!("{command:?}: {}", String::from_utf8_lossy(&output.stderr));
            false
        }
        Err(error) => {
            eprintln!("{command:?}: {error}");
            false
        }
    };
    let made = step(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&venv))
        && step(Command::new(&python).args(["-m", "pip", "install", "--quiet", "--prefer-binary", NUMPY]));
    if made && has_numpy() {
        return Some(python);
    }
    assert!(
        std::env::var_os("CI").is_none(),
        "this test cannot run without python3, its venv module and numpy"
    );
    eprintln!("skipped: this test needs python3, its venv module, and {NUMPY} from PyPI");
    None
}

#[test]
fn the_python_module_passes_its_tests() {
    if !place::can_page() {
        return;
    }
    let Some(python) = python() else { return };
    let test = Path::new(env!("CARGO_MANIFEST_DIR")).join("../client/python/test_fmalloc.py");
    let output = Command::new(python)
        .arg("-B")
        .arg(test)
        .env("FMALLOC_LIBRARY", place::binary("libfmalloc.so"))
        .env("FMALLOC_DAEMON", place::binary("fmallocd"))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("\nOK"), "{text}");
    assert!(!text.contains("skipped"), "{text}");
}
