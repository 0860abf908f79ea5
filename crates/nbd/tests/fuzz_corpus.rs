//! What fuzzers found worth keeping, again on every build.

use rempart_nbd::fuzz;

fn replay(target: &str, entry: fn(&[u8])) {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/");
    let files = std::fs::read_dir(format!("{folder}{target}")).expect("the corpus is there");
    let mut inputs = 0;
    for file in files {
        let path = file.expect("the folder can be read").path();
        println!("{}", path.display());
        entry(&std::fs::read(&path).expect("the file can be read"));
        inputs += 1;
    }
    assert!(inputs > 0, "no corpus for {target}");
}

#[test]
fn nbd_server_corpus() {
    replay("nbd_server", fuzz::server_session);
}

#[test]
fn nbd_client_corpus() {
    replay("nbd_client", fuzz::client);
}
