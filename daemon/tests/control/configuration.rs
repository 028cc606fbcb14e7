//! Flags, file and defaults.

use std::fs;
use std::process::{Command, Output};

use clap::Parser;
use fmalloc_proto::limits::MIN_BUDGET;
use fmallocd::config::{Cli, Config, ConfigError, LogLevel, Mode, Service, SocketMode};

use super::support::{MIB, Place};

/// Loads a configuration from flags and a file with this text.
fn load(text: &str, args: &[&str]) -> Result<Config, ConfigError> {
    let place = Place::new();
    let file = place.path("fmallocd.toml");
    let swap = place.path("swap");
    let socket = place.path("socket");
    fs::write(&file, text).unwrap();
    let mut line = vec!["fmallocd", "--config", file.to_str().unwrap()];
    if !text.contains("swap =") {
        line.extend(["--swap", swap.to_str().unwrap()]);
    }
    if !text.contains("socket =") {
        line.extend(["--socket", socket.to_str().unwrap()]);
    }
    line.extend(args);
    Config::load(&Cli::parse_from(line))
}

fn service(config: &Config) -> &Service {
    match &config.mode {
        Mode::Service(service) => service,
        Mode::Private(_) => panic!("not a service"),
    }
}

fn refused(text: &str, args: &[&str], parts: &[&str]) {
    let error = load(text, args).unwrap_err().to_string();
    for part in parts {
        assert!(error.contains(part), "{part:?} in {error:?}");
    }
}

#[test]
fn defaults_follow_from_the_pool() {
    let config = load("", &["--ram", "1G", "--swap-size", "1G"]).unwrap();
    assert_eq!((config.pool, config.default_budget, config.max_budget), (1024 * MIB, 256 * MIB, 1024 * MIB));
    assert_eq!(service(&config).socket_mode, SocketMode(0o660));
    assert_eq!(config.log_level, LogLevel::Info);
    assert!(config.features.io_uring && config.features.poison);
    let config = load("", &["--ram", "8M"]).unwrap();
    assert_eq!((config.default_budget, service(&config).swap_size), (MIN_BUDGET, Some(32 * MIB)));
    let config = load("", &["--ram", "1G", "--max-budget", "100M"]).unwrap();
    assert_eq!(config.default_budget, 100 * MIB);
    let config = load("", &[]).unwrap();
    assert!(config.pool >= MIN_BUDGET && config.default_budget <= config.pool / 4);
}

#[test]
fn file_sets_every_key() {
    let text = r#"
        socket = "/tmp/fmalloc-test-socket"
        socket_mode = "0600"
        swap = "/tmp/fmalloc-test-swap"
        swap_size = "256M"
        ram = 268435456
        default_budget = "16MiB"
        max_budget = "128M"
        allow_uid = [1000, 1001]
        allow_gid = [27]
        max_clients = 7
        max_clients_per_uid = 3
        max_regions = 9
        max_connections = 70
        log_level = "debug"
        no_io_uring = true
        no_poison = true
    "#;
    let config = load(text, &[]).unwrap();
    let service = service(&config);
    assert_eq!(service.socket.to_str(), Some("/tmp/fmalloc-test-socket"));
    assert_eq!(service.swap.to_str(), Some("/tmp/fmalloc-test-swap"));
    assert_eq!((service.socket_mode, service.swap_size), (SocketMode(0o600), Some(256 * MIB)));
    assert_eq!((&service.allow_uids[..], &service.allow_gids[..]), (&[1000, 1001][..], &[27][..]));
    assert_eq!((config.pool, config.default_budget, config.max_budget), (256 * MIB, 16 * MIB, 128 * MIB));
    let limits = config.limits;
    assert_eq!((limits.clients, limits.clients_per_uid, limits.regions, limits.connections), (7, 3, 9, 70));
    assert_eq!(config.log_level, LogLevel::Debug);
    assert!(!config.features.io_uring && !config.features.poison);
}

#[test]
fn flags_win_over_the_file() {
    let text = "ram = \"512M\"\ndefault_budget = \"64M\"\nallow_uid = [1, 2]\nlog_level = \"warn\"\n";
    let args = ["--ram", "1G", "--allow-uid", "5", "--allow-uid", "6", "--log-level", "error"];
    let config = load(text, &args).unwrap();
    assert_eq!((config.pool, config.default_budget), (1024 * MIB, 64 * MIB));
    assert_eq!(service(&config).allow_uids, [5, 6]);
    assert_eq!(config.log_level, LogLevel::Error);
    // Allowed users can connect without further settings.
    assert_eq!(service(&config).socket_mode, SocketMode(0o666));
}

#[test]
fn errors_name_the_place_and_the_remedy() {
    refused("ram = \"512M\"\nrma = 1\n", &[], &["fmallocd.toml", "line 2", "rma", "max_budget"]);
    refused("ram = \"12Q\"\n", &[], &["fmallocd.toml", "line 1", "not a size", "512M"]);
    refused("ram = -1\n", &[], &["line 1", "-1"]);
    refused("socket_mode = 660\n", &[], &["line 1", "string"]);
    refused("socket_mode = \"0999\"\n", &[], &["octal"]);
    refused("log_level = \"loud\"\n", &[], &["line 1", "loud", "info"]);
    refused("ram = \n", &[], &["fmallocd.toml", "line 1"]);
    refused("swap_size = 0\n", &[], &["fmallocd.toml: line 1: swap_size", "64GiB"]);
    refused("swap_size = \"900000T\"\n", &[], &["fmallocd.toml: line 1: swap_size", "disk"]);
    refused("ram = \"64M\"\nmax_budget = \"65M\"\n", &[], &["fmallocd.toml: line 2: max_budget", "64 MiB"]);
    refused("ram = \"64M\"\n", &["--max-budget", "65M"], &["--max-budget:", "64 MiB"]);
    refused(
        "ram = \"64M\"\ndefault_budget = \"65M\"\n",
        &[],
        &["fmallocd.toml: line 2: default_budget", "4 MiB"],
    );
    refused("ram = \"64M\"\ndefault_budget = \"1M\"\n", &[], &["default_budget", "4 MiB"]);
    refused("ram = \"1M\"\n", &[], &["fmallocd.toml: line 1: ram", "4 MiB"]);
    refused("max_clients = 0\n", &[], &["max_clients", "1 or more"]);
    refused("max_clients = 50\nmax_connections = 50\n", &[], &["max_connections", "50"]);
    refused(
        "swap = \"/nonexistent/a/swap\"\n",
        &[],
        &["fmallocd.toml: line 1: swap", "/nonexistent/a", "create"],
    );
    refused("socket = \"relative\"\n", &[], &["fmallocd.toml: line 1: socket", "absolute"]);
    let long = format!("socket = \"/tmp/{}\"\n", "x".repeat(110));
    refused(&long, &[], &["too long"]);
}

#[test]
fn missing_file_is_an_error_only_if_named() {
    let error = Config::load(&Cli::parse_from(["fmallocd", "--config", "/nonexistent.toml"])).unwrap_err();
    assert!(matches!(error, ConfigError::Read { .. }), "{error}");
}

fn check(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fmallocd")).arg("--check").args(args).output().unwrap()
}

#[test]
fn check_prints_a_file_of_the_same_effect() {
    let place = Place::new();
    let (socket, swap) = (place.path("socket"), place.path("swap"));
    let output = check(&[
        "--socket",
        socket.to_str().unwrap(),
        "--swap",
        swap.to_str().unwrap(),
        "--ram",
        "64M",
        "--swap-size",
        "100M",
        "--allow-gid",
        "27",
        "--no-poison",
    ]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(!socket.exists() && !swap.exists());
    let file = place.path("printed.toml");
    fs::write(&file, &output.stdout).unwrap();
    let again = check(&["--config", file.to_str().unwrap()]);
    assert_eq!(again.status.code(), Some(0), "{again:?}");
    assert_eq!(again.stdout, output.stdout);
}

#[test]
fn check_of_a_bad_configuration_ends_with_2() {
    let output = check(&["--ram", "64M", "--default-budget", "128M"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(!output.stderr.is_empty());
}
