#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| rempart_backup::fuzz::file_page(data));
