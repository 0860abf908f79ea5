use crate::support::{Cluster, DAY_MS, now};
use rempart_transport::pki::{
    Authority, CaPin, CertificateInfo, CertificateRequest, Credentials, PrivateKey, Validity,
};
use rempart_transport::{ClusterId, ErrorKind, Identity, TlsContext};
use rempart_types::NodeId;
use std::fs;
use std::os::unix::fs::PermissionsExt;

#[test]
fn a_certificate_names_its_holder_and_says_when_to_renew() {
    let mut cluster = Cluster::new(5);
    let identity = Identity::witness(cluster.id, NodeId(9));
    let start = now();
    let credentials = cluster.credentials(identity);
    let info = credentials.info().unwrap();
    assert_eq!(info.identity, identity);
    assert!(!info.renewal_due(start));
    assert!(info.renewal_due(rempart_types::WallTime(start.0 + 300 * DAY_MS)));
    assert_eq!(CertificateInfo::of_pem(credentials.certificate_pem()).unwrap(), info);
    assert_eq!(credentials.pin(), cluster.authority.pin());
    assert_ne!(credentials.pin(), CaPin([0; 32]));
}

#[test]
fn a_request_cannot_ask_for_more_than_its_key() {
    // The request of one member is signed for whom the authority names, whatever was in it.
    let mut cluster = Cluster::new(5);
    let identity = cluster.node(1);
    let request = CertificateRequest::generate().unwrap();
    let pem = cluster.authority.issue(&request.request_pem, identity, Validity::usual(now())).unwrap();
    assert_eq!(CertificateInfo::of_pem(&pem).unwrap().identity, identity);
    let other = Identity::node(ClusterId(6), NodeId(1));
    let refused = cluster.authority.issue(&request.request_pem, other, Validity::usual(now())).unwrap_err();
    assert_eq!(*refused.kind(), ErrorKind::WrongCluster);
}

#[test]
fn a_tampered_request_is_refused() {
    let mut cluster = Cluster::new(5);
    let identity = cluster.node(1);
    let request = CertificateRequest::generate().unwrap();
    let mut lines: Vec<String> = request.request_pem.lines().map(str::to_owned).collect();
    // One character in the middle of the signed part.
    let line = &mut lines[2];
    let swapped = if line.starts_with('A') { "B" } else { "A" };
    line.replace_range(0..1, swapped);
    let refused = cluster.authority.issue(&lines.join("\n"), identity, Validity::usual(now())).unwrap_err();
    assert_eq!(*refused.kind(), ErrorKind::CertificateInvalid);
    assert!(cluster.authority.issue("no request", identity, Validity::usual(now())).is_err());
}

#[test]
fn mismatched_credentials_are_refused_before_they_are_used() {
    let mut cluster = Cluster::new(5);
    let mut stranger = Cluster::new(6);
    let identity = cluster.node(1);
    let request = CertificateRequest::generate().unwrap();
    let ca = cluster.authority.certificate_pem().to_owned();
    let pem = cluster.authority.issue(&request.request_pem, identity, Validity::usual(now())).unwrap();
    let key = || PrivateKey::from_pem(&request.key.to_secret_pem()).unwrap();

    let wrong_key = Credentials::new(PrivateKey::generate().unwrap(), &pem, &ca, None).unwrap_err();
    assert_eq!(*wrong_key.kind(), ErrorKind::CertificateInvalid);
    let wrong_ca = Credentials::new(key(), &pem, stranger.authority.certificate_pem(), None).unwrap_err();
    assert_eq!(*wrong_ca.kind(), ErrorKind::WrongCluster);
    let list = stranger.authority.revocation_list(now()).unwrap();
    let wrong_list = Credentials::new(key(), &pem, &ca, Some(&list)).unwrap_err();
    assert_eq!(*wrong_list.kind(), ErrorKind::WrongCluster);
    // The same cluster id, but another authority: the signature tells.
    let twin = Cluster::new(5);
    let forged = Credentials::new(key(), &pem, twin.authority.certificate_pem(), None).unwrap_err();
    assert_eq!(*forged.kind(), ErrorKind::WrongCluster);
    assert!(Credentials::new(key(), &pem, &ca, None).is_ok());
    assert!(Credentials::new(key(), "garbage", &ca, None).is_err());
}

#[test]
fn files_survive_a_restart_and_nobody_else_reads_them() {
    let directory = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::new(5);
    let identity = cluster.node(1);
    let credentials = cluster.credentials(identity);
    let (own, authority) = (directory.path().join("own"), directory.path().join("authority"));
    credentials.save(&own).unwrap();
    cluster.authority.save(&authority).unwrap();
    for path in [&own, &authority] {
        assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o700);
        for file in fs::read_dir(path).unwrap() {
            let mode = file.unwrap().metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
    }
    let loaded = Credentials::load(&own).unwrap();
    assert_eq!(loaded.info().unwrap(), credentials.info().unwrap());
    assert!(loaded.revocation_list_pem().is_some());

    let mut reloaded = Authority::load(&authority).unwrap();
    assert_eq!(reloaded.cluster(), cluster.id);
    assert_eq!(reloaded.pin(), cluster.authority.pin());
    // It remembers whom it admitted: what it issued before can be revoked after.
    assert_eq!(reloaded.revoke(identity, now()), 1);
    assert_eq!(reloaded.revoke(identity, now()), 0);
}

#[test]
fn damaged_files_are_errors_that_name_the_file_or_the_part() {
    let directory = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::new(5);
    let identity = cluster.node(1);
    let own = directory.path();
    cluster.credentials(identity).save(own).unwrap();
    for file in ["certificate.pem", "key.pem", "ca.pem", "revoked.pem"] {
        let path = own.join(file);
        let good = fs::read(&path).unwrap();
        for damaged in [&good[..good.len() / 2], b"", &vec![b'x'; 2_000_000]] {
            fs::write(&path, damaged).unwrap();
            let error = Credentials::load(own).unwrap_err();
            assert_eq!(*error.kind(), ErrorKind::CertificateInvalid, "{file}: {error}");
        }
        fs::write(&path, &good).unwrap();
    }
    assert!(Credentials::load(own).is_ok());
    fs::remove_file(own.join("key.pem")).unwrap();
    let missing = Credentials::load(own).unwrap_err();
    assert!(missing.to_string().contains("key.pem"), "{missing}");
}

#[test]
fn reload_refuses_another_identity_and_an_older_revocation_list() {
    let mut cluster = Cluster::new(5);
    let (own, other) = (cluster.node(1), cluster.node(2));
    let older = cluster.credentials(own);
    let newer = cluster.credentials(own);
    let tls = TlsContext::new(&newer).unwrap();
    assert!(tls.reload(&older).is_err());
    assert!(tls.reload(&cluster.credentials(other)).is_err());
    assert!(tls.reload(&cluster.credentials(own)).is_ok());
}

#[test]
fn secrets_do_not_show_in_debug_output() {
    let mut cluster = Cluster::new(5);
    let request = CertificateRequest::generate().unwrap();
    let secret = request.key.to_secret_pem();
    let middle = secret.lines().nth(1).unwrap().to_owned();
    let identity = cluster.node(1);
    let credentials = cluster.credentials(identity);
    let shown = format!("{request:?} {credentials:?} {:?} {:?}", request.key, cluster.authority);
    assert!(!shown.contains(&middle));
    assert!(!shown.contains("PRIVATE"));
}
