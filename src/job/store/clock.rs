//! The clock of a store that one process has.
//!
//! Owns: time that does not step while the process runs. Does not know: whose time it is.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime};

// Tests that pause tokio's time turn this one too.
use tokio::time::Instant;

use super::row::{Moment, micros, since_1970};

/// Begins at the time of people's clocks, and goes on by the system's monotonic one.
#[derive(Debug)]
pub struct Clock {
    began: Instant,
    began_at: i64,
    hand: Hand,
}

impl Default for Clock {
    fn default() -> Self {
        Self { began: Instant::now(), began_at: since_1970(SystemTime::now()), hand: Hand::default() }
    }
}

impl Clock {
    /// The moment that it is.
    pub fn now(&self) -> Moment {
        let steady = self.began_at + micros(self.began.elapsed());
        self.hand.turned(Moment { steady, wall: since_1970(SystemTime::now()) })
    }

    /// What tests turn.
    #[cfg(test)]
    pub fn hand(&self) -> &Hand {
        &self.hand
    }
}

/// By how much a test has turned a clock, so that it need not wait.
#[derive(Debug, Default)]
pub struct Hand {
    ahead: AtomicI64,
    /// Where it was stopped; 0 while it goes.
    stands_at: AtomicI64,
    /// By how much people's clocks are wrong.
    wall_off: AtomicI64,
}

impl Hand {
    /// What a clock shows.
    pub fn turned(&self, real: Moment) -> Moment {
        let ahead = self.ahead.load(Ordering::Relaxed);
        let off = self.wall_off.load(Ordering::Relaxed);
        match self.stands_at.load(Ordering::Relaxed) {
            0 => Moment { steady: real.steady + ahead, wall: real.wall + ahead + off },
            at => Moment { steady: at + ahead, wall: at + ahead + off },
        }
    }

    /// Turns it on.
    #[cfg(test)]
    pub fn advance(&self, by: Duration) {
        self.ahead.fetch_add(micros(by), Ordering::Relaxed);
    }

    /// People put their clocks right, or wrong.
    #[cfg(test)]
    pub fn step_wall(&self, by: i64) {
        self.wall_off.fetch_add(by, Ordering::Relaxed);
    }

    /// Stops it; it moves when it is turned on.
    #[cfg(test)]
    pub fn stop(&self, at: i64) {
        self.stands_at.store(at, Ordering::Relaxed);
    }
}

/// Wakes those who wait for news. One who was about to wait is woken too, so that little gets lost.
#[derive(Debug, Default)]
pub struct News(tokio::sync::Notify);

impl News {
    /// There is some.
    pub fn announce(&self) {
        self.0.notify_waiters();
        self.0.notify_one();
    }

    /// Waits for some, at most so long.
    pub async fn wait(&self, at_most: Duration) {
        // Whether there was some or not: who asks looks for himself.
        let _ = tokio::time::timeout(at_most, self.0.notified()).await;
    }
}
