//! Plays a corpus, and a few changes of each input: for tests of crates that have fuzz targets, by `#[path]`.

/// Changed copies of each input. `REMPART_MUTATIONS` makes more of them.
const MUTATIONS: usize = 200;

pub fn replay(target: &str, entry: fn(&[u8])) {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/");
    let more = std::env::var("REMPART_MUTATIONS").ok().and_then(|text| text.parse().ok());
    let mut random = 88_172_645_463_325_252u64;
    let mut draw = |below: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random >> 8) as usize % below.max(1)
    };
    let mut inputs = 0;
    for file in std::fs::read_dir(format!("{folder}{target}")).expect("the corpus is there") {
        let path = file.expect("the folder can be read").path();
        println!("{}", path.display());
        let input = std::fs::read(&path).expect("the file can be read");
        entry(&input);
        for _ in 0..more.unwrap_or(MUTATIONS) {
            let mut changed = input.clone();
            for _ in 0..=draw(4) {
                let at = draw(changed.len());
                match draw(5) {
                    0 => changed.truncate(at),
                    1 => {
                        let piece = changed[at..changed.len().min(at + draw(32))].to_vec();
                        let to = draw(changed.len() + 1);
                        changed.splice(to..to, piece);
                    }
                    2 => changed.iter_mut().skip(at).take(1).for_each(|byte| *byte = draw(256) as u8),
                    _ => changed.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << draw(8)),
                }
            }
            entry(&changed);
        }
        inputs += 1;
    }
    assert!(inputs > 0, "no corpus for {target}");
}
