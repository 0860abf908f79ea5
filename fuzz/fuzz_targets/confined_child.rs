#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| rempart_backup::fuzz::confined_child(data));
