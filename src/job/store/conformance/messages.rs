//! Messages that a job has ended.

use super::*;

on_every_store!(much: each_end_is_told_once a_message_is_tried_until_it_is_settled);

const HOOK: &str = "https://hooks.example/tale";

fn hooked(owner: &str) -> NewJob {
    NewJob { webhook: Some(HOOK.to_owned()), ..job(owner) }
}

async fn each_end_is_told_once(rig: Rig) {
    let mut told = Vec::new();
    let take = async || -> Vec<Message> {
        let messages = rig.store.messages(10, LEASE).await.expect("messages");
        for message in &messages {
            rig.store.settle(&message.id, None).await.expect("settled");
        }
        messages
    };
    rig.end(job("a"), completed(1)).await;
    assert!(take().await.is_empty(), "nobody asked for one");
    for outcome in [completed(1), failed(), Outcome::Cancelled] {
        let ended = rig.end(hooked("a"), outcome).await;
        let messages = take().await;
        let [message] = &messages[..] else { panic!("{messages:?}") };
        assert_eq!((message.url.as_str(), message.job, message.attempts), (HOOK, ended.id, 0));
        assert_eq!((message.state.as_str(), Some(message.ended)), (ended.state.as_str(), ended.ended));
        told.push(message.id.clone());
    }
    let waiting = rig.order(hooked("a")).await;
    rig.store.cancel(waiting).await.expect("it waits");
    told.extend(take().await.into_iter().map(|message| message.id));
    rig.store.retry(waiting).await.expect("it was cancelled");
    rig.store.cancel(waiting).await.expect("it waits");
    told.extend(take().await.into_iter().map(|message| message.id));
    let late = rig.order(NewJob { deadline: Some(LEASE), ..hooked("a") }).await;
    rig.advance(OVER);
    rig.store.reap().await.expect("reaped");
    assert_eq!(rig.state(late).await, "failed");
    told.extend(take().await.into_iter().map(|message| message.id));
    let names: std::collections::HashSet<_> = told.iter().collect();
    assert_eq!((told.len(), names.len()), (6, 6), "{told:?}");
}

async fn a_message_is_tried_until_it_is_settled(rig: Rig) {
    for owner in ["a", "b", "c"] {
        rig.end(hooked(owner), completed(1)).await;
        rig.advance(Duration::from_millis(1));
    }
    let take = async |limit| rig.store.messages(limit, LEASE).await.expect("messages");
    let (first, rest) = (take(2).await, take(5).await);
    assert_eq!((first.len(), rest.len()), (2, 1));
    assert!(take(5).await.is_empty(), "all are somebody's");
    rig.store.settle(&first[0].id, None).await.expect("arrived");
    rig.store.settle(&first[1].id, Some(Duration::from_secs(300))).await.expect("again");
    rig.advance(OVER);
    let again = take(5).await;
    assert_eq!(again, [Message { attempts: 1, ..rest[0].clone() }], "who took it has gone");
    rig.store.settle(&again[0].id, None).await.expect("arrived");
    rig.advance(Duration::from_secs(300));
    let last = take(5).await;
    assert_eq!(last, [Message { attempts: 1, ..first[1].clone() }]);
    rig.store.settle(&last[0].id, None).await.expect("given up");
    rig.advance(Duration::from_secs(1000));
    assert!(take(5).await.is_empty());
    rig.store.settle(&last[0].id, Some(LEASE)).await.expect("it is gone, and stays so");
    rig.advance(Duration::from_secs(1000));
    assert!(take(5).await.is_empty());
}
