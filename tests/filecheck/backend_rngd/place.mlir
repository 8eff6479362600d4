// RUN: furiosa-llm opt %s --passes place | filecheck %s

// A buffer that nobody reads any more gives its bytes to the next one; memories are separate.
"rngd.block"() <{sym_name = "b"}> ({
^bb0(%h: !rngd.buffer<hbm, 0>):
  %x = "rngd.alloc"() <{label = "x"}> : () -> !rngd.buffer<dm, 64>
  "rngd.dma"(%h, %x) <{command = #rngd.command<"dma run=64 source(space=hbm base=0) destination(space=dm base=0)">}> : (!rngd.buffer<hbm, 0>, !rngd.buffer<dm, 64>) -> ()
  %v = "rngd.alloc"() <{label = "v"}> : () -> !rngd.buffer<dm, 64>
  "rngd.dma"(%x, %v) <{command = #rngd.command<"dma run=64 source(space=dm base=0) destination(space=dm base=0)">}> : (!rngd.buffer<dm, 64>, !rngd.buffer<dm, 64>) -> ()
  %z = "rngd.alloc"() <{label = "z"}> : () -> !rngd.buffer<dm, 32>
  "rngd.dma"(%v, %z) <{command = #rngd.command<"dma run=32 source(space=dm base=0) destination(space=dm base=0)">}> : (!rngd.buffer<dm, 64>, !rngd.buffer<dm, 32>) -> ()
  %t = "rngd.alloc"() <{label = "t"}> : () -> !rngd.buffer<trf, 65536>
}) : () -> ()
// CHECK: label = "x", address = 0 : i64
// CHECK: label = "v", address = 64 : i64
// CHECK: label = "z", address = 0 : i64
// CHECK: label = "t", address = 0 : i64
