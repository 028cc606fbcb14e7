//! Who gets in, and who may see and change what.

use fmalloc_proto::hello::Role;
use fmalloc_proto::limits::MIN_BUDGET;
use fmalloc_proto::messages::{Empty, ErrorCode, Evict, Limit, Page, Reply, Request};

use super::support::{Daemon, MIB, as_user, is_root};

const STRANGER: u32 = 65534;
const GUEST: u32 = 61001;
const GROUP: u32 = 61002;

#[test]
fn stranger_is_denied_with_a_reason() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::start(&["--socket-mode", "0666"]);
    as_user(STRANGER, &[], || {
        let peer = daemon.connect(Role::Pager);
        let failure = peer.open(MIN_BUDGET).unwrap_err();
        assert_eq!(failure.code, ErrorCode::Denied);
        assert!(failure.text.contains("--allow-uid"), "{}", failure.text);
        peer.assert_closed();
        let peer = daemon.connect(Role::Control);
        peer.send(1, &Request::Status(Empty {}), &[]);
        peer.assert_ended(ErrorCode::Denied);
    });
    daemon.assert_alive();
}

#[test]
fn socket_mode_keeps_strangers_out_already() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::start(&[]);
    let socket = daemon.place.socket();
    let errno = as_user(STRANGER, &[], || fmalloc_proto::transport::connect(&socket).unwrap_err());
    assert_eq!(errno, nix::errno::Errno::EACCES);
}

#[test]
fn many_strangers_at_once_cost_others_nothing() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::start(&["--socket-mode", "0666", "--max-connections", "20", "--max-clients", "10"]);
    let socket = daemon.place.socket();
    let strangers = as_user(STRANGER, &[], || {
        (0..500).map(|_| fmalloc_proto::transport::connect(&socket).unwrap()).collect::<Vec<_>>()
    });
    daemon.assert_alive();
    drop(strangers);
}

#[test]
fn allowed_user_and_group_member_get_in() {
    if !is_root() {
        return;
    }
    let (uid, gid) = (GUEST.to_string(), GROUP.to_string());
    let daemon = Daemon::start(&["--allow-uid", &uid, "--allow-gid", &gid]);
    as_user(GUEST, &[], || daemon.connect(Role::Pager).open(MIN_BUDGET).map(drop).unwrap());
    as_user(STRANGER, &[1, 2, GROUP], || daemon.connect(Role::Pager).open(MIN_BUDGET).map(drop).unwrap());
    let many: Vec<u32> = (70_000..70_500).chain([GROUP]).collect();
    as_user(STRANGER, &many, || daemon.connect(Role::Pager).open(MIN_BUDGET).map(drop).unwrap());
    let denied =
        as_user(STRANGER, &[GROUP + 1], || daemon.connect(Role::Pager).open(MIN_BUDGET).unwrap_err());
    assert_eq!(denied.code, ErrorCode::Denied);
}

#[test]
fn group_member_reaches_a_socket_of_the_default_mode() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::start(&["--allow-gid", &GROUP.to_string()]);
    as_user(STRANGER, &[GROUP], || daemon.connect(Role::Pager).open(MIN_BUDGET).map(drop).unwrap());
}

#[test]
fn user_sees_and_changes_its_own_clients_only() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::start(&["--allow-uid", &GUEST.to_string()]);
    let roots = daemon.connect(Role::Pager);
    let number = roots.open(8 * MIB).unwrap().0.client;
    as_user(GUEST, &[], || {
        let own = daemon.connect(Role::Pager);
        let own_number = own.open(8 * MIB).unwrap().0.client;
        let tool = daemon.connect(Role::Control);
        let Reply::Clients(list) = tool.ask(&Request::Clients(Page { after: 0 })) else { panic!() };
        assert_eq!(list.rows.iter().map(|row| row.client).collect::<Vec<_>>(), [own_number]);
        for request in [
            Request::Limit(Limit { client: number, bytes: 16 * MIB }),
            Request::Evict(Evict { client: number, region: None, bytes: None }),
        ] {
            match tool.ask(&request) {
                Reply::Error(failure) => assert_eq!(failure.code, ErrorCode::NotFound),
                other => panic!("unexpected {other:?}"),
            }
        }
        assert!(matches!(tool.ask(&Request::Status(Empty {})), Reply::Status(status) if status.clients == 2));
    });
    let tool = daemon.connect(Role::Control);
    assert!(matches!(tool.ask(&Request::Clients(Page { after: 0 })), Reply::Clients(list)
        if list.rows.iter().any(|row| row.client == number)));
}
