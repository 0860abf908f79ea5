use crate::support::now;
use proptest::prelude::*;
use rempart_transport::pki::CaPin;
use rempart_transport::{ClusterId, EnrolmentToken, ErrorKind, Role, Secret, TokenBook};
use rempart_types::{NodeId, WallTime};
use std::time::Duration;

const HOUR: Duration = Duration::from_secs(3600);

fn create(book: &mut TokenBook, role: Role) -> EnrolmentToken {
    let addresses = vec!["192.0.2.1:7420".to_owned(), "[2001:db8::1]:7420".to_owned()];
    book.create(ClusterId(3), addresses, CaPin([7; 32]), role, HOUR, now()).unwrap()
}

#[test]
fn text_carries_everything_and_any_damage_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let mut book = TokenBook::open(directory.path().join("tokens.json")).unwrap();
    let token = create(&mut book, Role::Node);
    let text = token.to_string();
    assert!(text.starts_with("rempart1_"), "{text}");
    assert_eq!(format!(" {text}\n").parse::<EnrolmentToken>().unwrap(), token);
    for index in 0..text.len() {
        let mut damaged = text.clone().into_bytes();
        damaged[index] = if damaged[index] == b'A' { b'B' } else { b'A' };
        let error = String::from_utf8(damaged).unwrap().parse::<EnrolmentToken>().unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::BadToken);
        assert!(text[..index].parse::<EnrolmentToken>().is_err());
    }
    assert!("rempart2_AAAA".parse::<EnrolmentToken>().is_err());
}

#[test]
fn a_token_is_good_once_even_across_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tokens.json");
    let token = create(&mut TokenBook::open(&path).unwrap(), Role::Node);
    let redeem = |secret: &Secret, role, now| {
        let mut book = TokenBook::open(&path).unwrap();
        book.redeem(secret, role, NodeId(1), now).map_err(|error| error.kind().clone())
    };
    assert_eq!(redeem(&token.secret, Role::Witness, now()), Err(ErrorKind::TokenWrongRole));
    assert_eq!(redeem(&token.secret, Role::Node, now()), Ok(()));
    assert_eq!(redeem(&token.secret, Role::Node, now()), Err(ErrorKind::TokenUsed));
    let sent = Secret::from_hex(&token.secret.to_secret_hex()).unwrap();
    assert_eq!(redeem(&sent, Role::Node, now()), Err(ErrorKind::TokenUsed));
}

#[test]
fn expired_and_unknown_tokens_are_told_apart() {
    let directory = tempfile::tempdir().unwrap();
    let mut book = TokenBook::open(directory.path().join("tokens.json")).unwrap();
    let token = create(&mut book, Role::Witness);
    let late = WallTime(token.expires.0);
    let kind = |result: Result<(), rempart_transport::Error>| result.map_err(|error| error.kind().clone());
    assert_eq!(
        kind(book.redeem(&token.secret, Role::Witness, NodeId(1), late)),
        Err(ErrorKind::TokenExpired)
    );
    let stranger = Secret::from_hex(&"0".repeat(32)).unwrap();
    assert_eq!(kind(book.redeem(&stranger, Role::Witness, NodeId(1), now())), Err(ErrorKind::TokenUnknown));
    assert!(Secret::from_hex("12").is_err());
}

#[test]
fn the_secret_is_neither_shown_nor_stored() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tokens.json");
    let mut book = TokenBook::open(&path).unwrap();
    let token = create(&mut book, Role::Node);
    let secret = token.secret.to_secret_hex();
    let stored = std::fs::read_to_string(&path).unwrap();
    assert!(!stored.contains(&secret));
    assert!(!format!("{token:?} {book:?}").contains(&secret));
    assert_eq!(format!("{:?}", token.secret), "Secret(..)");
}

#[test]
fn a_damaged_book_is_an_error_not_an_empty_book() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tokens.json");
    create(&mut TokenBook::open(&path).unwrap(), Role::Node);
    let good = std::fs::read(&path).unwrap();
    std::fs::write(&path, &good[..good.len() - 3]).unwrap();
    assert!(TokenBook::open(&path).is_err());
}

proptest! {
    #[test]
    fn any_text_is_refused_without_a_panic(text in "\\PC{0,80}") {
        prop_assert!(text.parse::<EnrolmentToken>().is_err());
        let prefixed = format!("rempart1_{text}");
        prop_assert!(prefixed.parse::<EnrolmentToken>().is_err());
    }
}
