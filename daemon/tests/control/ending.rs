//! How a daemon starts beside others and ends: exclusive socket and swap file, signals, private mode.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use fmalloc_proto::hello::Role;
use fmalloc_proto::transport;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::Signal;

use super::support::{Daemon, MIB, Peer, Place, command, wait_for};

#[test]
fn second_daemon_on_the_same_swap_is_refused_with_the_pid_of_the_first() {
    let first = Daemon::start(&[]);
    let (place, swap) = (Place::new(), first.place.path("swap"));
    let mut second = command(&place, &["--swap", swap.to_str().unwrap()]).spawn().unwrap();
    assert_eq!(wait_for(&mut second).code(), Some(1));
    let log = place.log();
    assert!(log.contains(&format!("process {}", first.pid())) && log.contains("--swap"), "{log}");
    first.assert_alive();
}

#[test]
fn second_daemon_on_the_same_socket_is_refused_with_the_pid_of_the_first() {
    let first = Daemon::start(&[]);
    let other = first.place.path("other-swap");
    let mut second = command(&first.place, &["--swap", other.to_str().unwrap()]).spawn().unwrap();
    assert_eq!(wait_for(&mut second).code(), Some(1));
    let log = first.place.log();
    assert!(log.contains(&format!("process {} listens", first.pid())), "{log}");
    first.assert_alive();
}

#[test]
fn successor_of_a_killed_daemon_takes_over_socket_and_swap() {
    let place = Daemon::start(&[]).kill();
    assert!(place.socket().exists());
    std::fs::remove_file(place.path("log")).unwrap();
    Daemon::start_in(place, &[]).assert_alive();
}

#[test]
fn file_in_place_of_the_socket_is_left_alone() {
    let place = Place::new();
    std::fs::write(place.socket(), "precious").unwrap();
    let mut child = command(&place, &[]).spawn().unwrap();
    assert_eq!(wait_for(&mut child).code(), Some(1));
    assert_eq!(std::fs::read_to_string(place.socket()).unwrap(), "precious");
}

#[test]
fn sigterm_and_sigint_end_an_idle_daemon_in_order() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut daemon = Daemon::start(&[]);
        // Connected, opened, but without memory: no reason to stay.
        let peer = daemon.connect(Role::Pager);
        peer.open(8 * MIB).unwrap();
        daemon.signal(signal);
        assert_eq!(daemon.wait().code(), Some(0));
        assert!(!daemon.place.socket().exists());
        peer.assert_closed();
    }
}

#[test]
fn missing_directories_are_made() {
    let place = Place::new();
    let (socket, swap) = (place.path("run/socket"), place.path("lib/swap"));
    let args = ["--swap", swap.to_str().unwrap(), "--socket", socket.to_str().unwrap()];
    let mut child = command(&place, &args).spawn().unwrap();
    super::support::wait_until("the socket is there", || transport::connect(&socket).is_ok());
    assert!(swap.exists());
    child.kill().unwrap();
    child.wait().unwrap();
}

/// A private daemon and the client's end of its socket.
fn private(place: &Place, args: &[&str]) -> (Child, Peer) {
    let (ours, theirs) = transport::pair().unwrap();
    (private_over(place, &theirs, args), Peer::over(ours))
}

/// A private daemon over this socket.
fn private_over(place: &Place, socket: &OwnedFd, args: &[&str]) -> Child {
    let fd = socket.as_raw_fd();
    let mut command = Command::new(env!("CARGO_BIN_EXE_fmallocd"));
    command.args(["--private", "--private-fd", &fd.to_string(), "--swap-size", "64M"]).args(args);
    command.arg("--swap-dir").arg(place.path(""));
    // SAFETY: between fork and exec only fcntl is called; the descriptor is open in the child as it is here.
    unsafe {
        command.pre_exec(move || {
            let fd = std::os::fd::BorrowedFd::borrow_raw(fd);
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
            Ok(())
        });
    }
    command.spawn().unwrap()
}

#[test]
fn private_daemon_serves_its_client_and_ends_with_it() {
    let place = Place::new();
    let start = Instant::now();
    let (mut child, peer) = private(&place, &["--ram", "64M"]);
    peer.hello(Role::Pager);
    let ready = start.elapsed();
    assert!(ready < Duration::from_secs(2), "{ready:?}");
    let (opened, _) = peer.open(32 * MIB).unwrap();
    assert_eq!(opened.budget, 32 * MIB);
    drop(peer);
    assert_eq!(wait_for(&mut child).code(), Some(0));
    assert_eq!(std::fs::read_dir(place.path("")).unwrap().count(), 0);
}

#[test]
fn private_daemon_hands_out_no_device_in_user_mode() {
    let place = Place::new();
    let (mut child, peer) = private(&place, &["--user-mode-only"]);
    peer.hello(Role::Pager);
    let (opened, fds) = peer.open(8 * MIB).unwrap();
    assert_eq!((opened.device, fds.len()), (false, 3));
    drop(peer);
    assert_eq!(wait_for(&mut child).code(), Some(0));
}

#[test]
fn private_daemon_ends_when_its_client_never_speaks() {
    let place = Place::new();
    let (mut child, peer) = private(&place, &[]);
    drop(peer);
    assert_eq!(wait_for(&mut child).code(), Some(0));
}

#[test]
fn private_daemon_that_listens_ends_after_its_owner_and_all_clients() {
    let place = Place::new();
    let name = format!("@fmalloc-ending-test-{}", std::process::id());
    let listener = transport::listen_abstract(name.as_ref()).unwrap();
    let mut owner = Command::new("sleep").arg("100").spawn().unwrap();
    let owner_pid = owner.id().to_string();
    let mut child = private_over(&place, &listener, &["--ram", "64M", "--private-owner", &owner_pid]);
    drop(listener);

    let client = |bytes| {
        let peer = Peer::over(transport::connect(name.as_ref()).unwrap());
        peer.hello(Role::Pager);
        assert_eq!(peer.open(bytes).unwrap().0.budget, bytes);
        peer
    };
    drop(client(8 * MIB));
    std::thread::sleep(Duration::from_millis(200));
    let last = client(16 * MIB);
    owner.kill().unwrap();
    owner.wait().unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert!(child.try_wait().unwrap().is_none(), "it has ended although a client is left");
    let another = client(8 * MIB);
    drop((last, another));
    assert_eq!(wait_for(&mut child).code(), Some(0));
    assert_eq!(transport::connect(name.as_ref()).unwrap_err(), nix::errno::Errno::ECONNREFUSED);
    assert_eq!(std::fs::read_dir(place.path("")).unwrap().count(), 0);
}

#[test]
fn private_descriptor_that_is_no_socket_is_refused() {
    for fd in ["1", "77"] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_fmallocd"))
            .args(["--private", "--private-fd", fd, "--swap-size", "64M"])
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        assert_eq!(wait_for(&mut child).code(), Some(1));
    }
}
