//! The books of the RAM pool: what is granted to whom, never more in all than the pool has. Used on the control
//! thread only; says nothing about what clients really hold, which their fault threads see to.

use std::cell::Cell;
use std::rc::Rc;

use fmalloc_proto::size::Size;
use thiserror::Error;

/// RAM that may be granted in all.
#[derive(Debug)]
pub(crate) struct Pool {
    size: u64,
    granted: Cell<u64>,
}

/// What the pool cannot grant.
#[derive(Debug, Error, PartialEq, Eq)]
#[error(
    "the RAM pool cannot grant {}: {} of its {} are granted; {} would be possible. Ask for less, lower another \
     client with `fmallocctl limit`, or give fmallocd more --ram",
    Size(*wanted), Size(*granted), Size(*size), Size(*possible)
)]
pub(crate) struct PoolFull {
    /// Bytes asked for, in all for this client.
    pub(crate) wanted: u64,
    /// Bytes granted to all at present.
    pub(crate) granted: u64,
    /// Bytes of the pool.
    pub(crate) size: u64,
    /// The most that this client could have now.
    pub(crate) possible: u64,
}

impl Pool {
    pub(crate) fn new(size: u64) -> Rc<Self> {
        Rc::new(Self { size, granted: Cell::new(0) })
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    pub(crate) fn granted(&self) -> u64 {
        self.granted.get()
    }

    /// Grants `bytes` to a client.
    pub(crate) fn grant(self: &Rc<Self>, bytes: u64) -> Result<Grant, PoolFull> {
        let grant = Grant { pool: Rc::clone(self), bytes: Cell::new(0), ended: Cell::new(false) };
        grant.set(bytes)?;
        Ok(grant)
    }
}

/// A client's part of the pool; goes back when the value is dropped.
#[derive(Debug)]
pub(crate) struct Grant {
    pool: Rc<Pool>,
    bytes: Cell<u64>,
    ended: Cell<bool>,
}

impl Grant {
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.get()
    }

    /// Makes it `bytes`, more or less than before. After an error nothing has changed.
    pub(crate) fn set(&self, bytes: u64) -> Result<(), PoolFull> {
        let (size, granted) = (self.pool.size, self.pool.granted.get());
        let others = granted - self.bytes.get();
        let possible = if self.ended.get() { 0 } else { size - others };
        if bytes > possible {
            return Err(PoolFull { wanted: bytes, granted, size, possible });
        }
        self.pool.granted.set(others + bytes);
        self.bytes.set(bytes);
        Ok(())
    }

    /// Gives it back for good: a late change of the budget takes nothing again.
    pub(crate) fn end(&self) {
        self.ended.set(true);
        self.pool.granted.set(self.pool.granted.get() - self.bytes.replace(0));
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grant_over_the_pool_is_refused_with_the_figures() {
        let pool = Pool::new(100);
        let first = pool.grant(70).unwrap();
        let refused = pool.grant(40).unwrap_err();
        assert_eq!(refused, PoolFull { wanted: 40, granted: 70, size: 100, possible: 30 });
        let second = pool.grant(30).unwrap();
        assert_eq!(pool.granted(), 100);
        drop(first);
        assert_eq!(pool.granted(), 30);
        assert_eq!(second.bytes(), 30);
    }

    #[test]
    fn change_counts_the_own_grant_as_possible() {
        let pool = Pool::new(100);
        let (one, other) = (pool.grant(50).unwrap(), pool.grant(20).unwrap());
        assert_eq!(one.set(81).unwrap_err().possible, 80);
        assert_eq!(one.bytes(), 50);
        one.set(80).unwrap();
        one.set(10).unwrap();
        assert_eq!((pool.granted(), other.bytes()), (30, 20));
    }

    #[test]
    fn ended_grant_takes_nothing_again() {
        let pool = Pool::new(100);
        let grant = pool.grant(50).unwrap();
        grant.end();
        assert_eq!(grant.set(1).unwrap_err().possible, 0);
        drop(grant);
        assert_eq!(pool.granted(), 0);
    }
}
