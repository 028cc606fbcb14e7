//! Where the parts of fmalloc are that `fmallocctl` needs beside itself.

use std::path::PathBuf;

/// Name of the library that is put in front of libc.
const LIBRARY: &str = "libfmalloc_preload.so";

/// `fmallocd`, where a program's library looks for it.
pub(super) fn find_daemon() -> Option<PathBuf> {
    if let Some(named) = variable("FMALLOC_DAEMON") {
        return Some(named);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path =
        std::env::split_paths(&path).filter(|dir| dir.is_absolute()).map(|dir| dir.join("fmallocd"));
    let elsewhere =
        ["/usr/libexec/fmalloc/fmallocd", "/usr/local/libexec/fmalloc/fmallocd"].map(PathBuf::from);
    let beside = own_dir().map(|dir| dir.join("fmallocd"));
    beside.into_iter().chain(in_path).chain(elsewhere).find(|path| path.is_file())
}

/// The library that is put in front of libc; an error names the places where it is not.
pub(super) fn find_library() -> Result<PathBuf, Vec<PathBuf>> {
    let places = match variable("FMALLOC_PRELOAD") {
        Some(named) => vec![named],
        None => {
            let own = own_dir();
            let beside = own.iter().map(|dir| dir.join(LIBRARY));
            let installed =
                own.iter().filter_map(|dir| Some(dir.parent()?.join("lib/fmalloc").join(LIBRARY)));
            let usual =
                ["/usr/lib/fmalloc", "/usr/local/lib/fmalloc"].map(|dir| PathBuf::from(dir).join(LIBRARY));
            beside.chain(installed).chain(usual).collect()
        }
    };
    // The loader of the program resolves it from wherever that is.
    let found = places.iter().find(|path| path.is_file()).and_then(|path| std::path::absolute(path).ok());
    found.ok_or(places)
}

fn own_dir() -> Option<PathBuf> {
    Some(std::env::current_exe().ok()?.parent()?.to_owned())
}

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}
