//! The C library: programs in C and C++, compiled here against header and library, and a program that loads it.

#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use fmalloc_tests::place;

fn run(command: &mut Command) -> Output {
    let output = command.env("FMALLOC_DAEMON", place::binary("fmallocd")).output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// Compiles a program with warnings as errors, links it with the library, runs it with a directory and the names of files in it.
fn compile_and_run(compiler: &str, standard: &str, source: &str, linked_in: bool, more: &[&str]) {
    if !place::can_page() {
        return;
    }
    let dir = place::directory();
    let capi = Path::new(env!("CARGO_MANIFEST_DIR")).join("../client/capi");
    let library = place::binary(if linked_in { "libfmalloc.a" } else { "libfmalloc.so" });
    let program = dir.path().join("program");
    let mut command = Command::new(compiler);
    command.args([standard, "-g", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]);
    command.arg("-I").arg(capi.join("include")).arg("-o").arg(&program);
    command.arg(capi.join("tests/programs").join(source)).arg(&library);
    if linked_in {
        command.args(["-lpthread", "-ldl", "-lm", "-lgcc_s"]);
    } else {
        command.arg("-Wl,-rpath").arg(library.parent().unwrap()).arg("-lpthread");
    }
    run(&mut command);
    let files = more.iter().map(|name| dir.path().join(name));
    let output = run(Command::new(&program).arg(dir.path()).args(files));
    assert_eq!(output.stdout, b"all right\n");
}

#[test]
fn a_program_in_c_with_the_shared_library() {
    compile_and_run("gcc", "-std=c11", "basic.c", false, &[]);
}

#[test]
fn a_program_in_c_with_the_static_library() {
    compile_and_run("gcc", "-std=gnu17", "basic.c", true, &[]);
}

#[test]
fn a_program_as_the_users_of_the_original_write_it() {
    compile_and_run("gcc", "-std=c99", "original.c", false, &[]);
}

#[test]
fn a_program_with_pagers_and_regions() {
    compile_and_run("gcc", "-std=c99", "regions.c", false, &["file"]);
}

#[test]
fn a_program_in_cpp() {
    compile_and_run("g++", "-std=c++17", "containers.cpp", false, &[]);
}

#[test]
fn a_program_that_loads_the_library() {
    if place::can_page() {
        let library: PathBuf = place::binary("libfmalloc.so");
        let output = run(Command::new(place::binary("examples/load_library")).arg(library).arg("/var/tmp"));
        assert_eq!(output.stdout, b"all right\n");
    }
}
