//! What `fmallocctl` asks for. Administrators see and change every client, others their own.

use std::rc::Rc;
use std::sync::Arc;

use fmalloc_proto::PAGE;
use fmalloc_proto::groups::GroupToken;
use fmalloc_proto::limits::MAX_ROWS;
use fmalloc_proto::messages::{
    Budget, ClientList, Empty, ErrorCode, Evict, Evicted, Failure, Limit, Page, RegionList, RegionsQuery,
    Reply, Request,
};
use fmalloc_proto::size::Size;
use fmalloc_proto::validate;
use tokio::sync::Semaphore;
use tracing::info;

use super::auth::Peer;
use super::clients::{Client, answer};
use super::connection::{Connection, RecvError, failure};
use super::family::Families;
use super::session::{Pending, answer_later, check_budget, next, now};
use super::{Daemon, MAX_OUTSTANDING};
use crate::fault::Command;

/// Serves a control connection until it ends.
pub(crate) async fn run(daemon: Rc<Daemon>, connection: Rc<Connection>, peer: Peer) {
    let outstanding = Arc::new(Semaphore::new(MAX_OUTSTANDING));
    let error = loop {
        let (incoming, permit) = match next(&connection, &outstanding).await {
            Ok(next) => next,
            Err(error) => break error,
        };
        match dispatch(&daemon, &connection, &peer, incoming.request) {
            Ok(pending) => answer_later(&connection, incoming.id, pending, permit),
            Err(text) => break RecvError::violation(incoming.id, text),
        }
    };
    daemon.reject(&connection, &peer, error).await;
    connection.end();
}

/// Starts on a request; an error is a breach of the protocol.
fn dispatch(
    daemon: &Rc<Daemon>,
    connection: &Connection,
    peer: &Peer,
    request: Request,
) -> Result<Pending, &'static str> {
    if let Err(error) = validate::request(&request) {
        return Ok(now(Reply::Error(failure(ErrorCode::Invalid, error))));
    }
    let result = match request {
        Request::Ping(_) => Ok(now(Reply::Done(Empty {}))),
        Request::Status(_) => Ok(now(Reply::Status(Box::new(daemon.status())))),
        Request::Clients(page) => Ok(now(Reply::Clients(clients(daemon, peer, page)))),
        Request::Regions(query) => regions(daemon, peer, query),
        Request::Limit(limit) => start_limit(daemon, peer, limit),
        Request::Evict(evict) => start_evict(daemon, peer, evict),
        Request::Latency(which) => {
            find(daemon, peer, which.client).map(|client| now(Reply::Latency(client.latency())))
        }
        Request::NewGroup(Budget { bytes }) => Families::make(daemon, connection, peer, bytes)
            .map(|token| now(Reply::Group(GroupToken { token }))),
        Request::GroupStats(GroupToken { token }) => {
            daemon.families.stats(token).map(|stats| now(Reply::GroupStats(Box::new(stats))))
        }
        _ => return Err("this is a control connection; a paging client needs one of its own"),
    };
    Ok(result.unwrap_or_else(|failure| now(Reply::Error(failure))))
}

fn may_see(daemon: &Daemon, peer: &Peer, client: &Client) -> bool {
    daemon.policy().is_administrator(peer) || client.uid() == peer.uid
}

fn find(daemon: &Daemon, peer: &Peer, number: u64) -> Result<Rc<Client>, Failure> {
    daemon.clients.get(number).filter(|client| may_see(daemon, peer, client)).ok_or_else(|| {
        failure(
            ErrorCode::NotFound,
            format!("there is no client {number} of yours; see `fmallocctl clients`"),
        )
    })
}

fn clients(daemon: &Daemon, peer: &Peer, page: Page) -> ClientList {
    let mut seen =
        daemon.clients.after(page.after).into_iter().filter(|client| may_see(daemon, peer, client));
    let rows = seen.by_ref().take(MAX_ROWS).map(|client| client.row()).collect();
    ClientList { rows, more: seen.next().is_some() }
}

fn regions(daemon: &Daemon, peer: &Peer, query: RegionsQuery) -> Result<Pending, Failure> {
    let client = find(daemon, peer, query.client)?;
    if !client.is_attached() {
        return Ok(now(Reply::Regions(RegionList { rows: Vec::new(), more: false })));
    }
    let awaited = client.ask(|answer| Command::Regions { from: query.from, answer });
    Ok(Box::pin(async move {
        match answer(awaited).await {
            Ok((rows, more)) => Reply::Regions(RegionList { rows, more }),
            Err(failure) => Reply::Error(failure),
        }
    }))
}

fn start_limit(daemon: &Rc<Daemon>, peer: &Peer, limit: Limit) -> Result<Pending, Failure> {
    let client = find(daemon, peer, limit.client)?;
    if !daemon.policy().is_administrator(peer) {
        check_budget(limit.bytes, daemon.config().max_budget)?;
    }
    let uid = peer.uid;
    let daemon = Rc::clone(daemon);
    Ok(Box::pin(async move {
        let bytes = limit.bytes;
        if let Err(failure) = client.set_budget(bytes).await {
            return Reply::Error(failure);
        }
        client.family.notify_budget();
        if daemon.throttle.allows() {
            info!(client = client.number, by_uid = uid, budget = %Size(bytes), "budget changed");
        }
        Reply::Budget(Budget { bytes })
    }))
}

fn start_evict(daemon: &Daemon, peer: &Peer, evict: Evict) -> Result<Pending, Failure> {
    let client = find(daemon, peer, evict.client)?;
    let pages = evict.bytes.map_or(u64::MAX, |bytes| bytes.div_ceil(PAGE));
    let awaited = client.ask(|answer| Command::Evict { region: evict.region, pages, answer });
    Ok(Box::pin(async move {
        match answer(awaited).await {
            Ok(bytes) => Reply::Evicted(Evicted { bytes }),
            Err(failure) => Reply::Error(failure),
        }
    }))
}
