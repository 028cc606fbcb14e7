//! The header `fmalloc.h` is made from the sources, and committed. This test makes it anew and compares; with
//! FMALLOC_UPDATE_HEADER set it writes it.

#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]

use std::path::Path;

#[test]
fn the_committed_header_is_that_of_the_sources() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut builder = cbindgen::Builder::new()
        .with_config(cbindgen::Config::from_file(root.join("cbindgen.toml")).unwrap());
    // In the order in which a reader wants them.
    for file in ["options", "state", "memory", "figures", "regions", "files", "failure"] {
        builder = builder.with_src(root.join("src").join(file).with_extension("rs"));
    }
    let mut made = Vec::new();
    builder.generate().unwrap().write(&mut made);
    let made = String::from_utf8(made).unwrap();
    let path = root.join("include/fmalloc.h");
    if std::env::var_os("FMALLOC_UPDATE_HEADER").is_some() {
        std::fs::write(&path, &made).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        made == committed,
        "the header is old: FMALLOC_UPDATE_HEADER=1 cargo test -p fmalloc-capi --test header"
    );
}
