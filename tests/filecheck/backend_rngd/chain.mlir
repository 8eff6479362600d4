// RUN: furiosa-llm opt %s --passes chain --split-input-file | filecheck %s

// Layers find their weight and a table in data memory. The first call loads both; a layer loads the
// next one's weight and leaves the table where it is; the last call has a block that loads nothing.
%h0 = "rngd.region"() <{region_name = "h0", content = {scratch_bytes = 262144 : i64}}> : () -> !rngd.buffer<hbm, 0>
%h1 = "rngd.region"() <{region_name = "h1", content = {scratch_bytes = 262144 : i64}}> : () -> !rngd.buffer<hbm, 0>
%table = "rngd.region"() <{region_name = "table", content = {derived = {}}}> : () -> !rngd.buffer<hbm, 0>
%w0 = "rngd.region"() <{region_name = "w0", content = {parameter = {}}}> : () -> !rngd.buffer<hbm, 0>
%w1 = "rngd.region"() <{region_name = "w1", content = {parameter = {}}}> : () -> !rngd.buffer<hbm, 0>
"rngd.block"() <{sym_name = "first"}> ({
^bb0(%h: !rngd.buffer<hbm, 0>, %o: !rngd.buffer<hbm, 0>):
  %x = "rngd.alloc"() <{label = "x"}> : () -> !rngd.buffer<dm, 4096>
  "rngd.dma"(%h, %x) <{command = #rngd.command<"dma n=64 run=4096 source(space=hbm base=0 strides=4096) destination(space=dm base=0 strides=4194304)">}> : (!rngd.buffer<hbm, 0>, !rngd.buffer<dm, 4096>) -> ()
  %y = "rngd.alloc"() <{label = "y"}> : () -> !rngd.buffer<dm, 4096>
  "rngd.exec"(%x, %y) <{command = #rngd.command<"exec context=sub counter(n=512 a=8 commit=8) a(dtype=f32) stream(run=2) commit_port(dtype=f32) commit(columns=2 column_stride=4)">, operandSegmentSizes = array<i32: 1, 0, 0, 0, 1>}> : (!rngd.buffer<dm, 4096>, !rngd.buffer<dm, 4096>) -> ()
  "rngd.dma"(%y, %o) <{command = #rngd.command<"dma n=64 run=4096 source(space=dm base=0 strides=4194304) destination(space=hbm base=0 strides=4096)">}> : (!rngd.buffer<dm, 4096>, !rngd.buffer<hbm, 0>) -> ()
}) : () -> ()
"rngd.block"() <{sym_name = "layer"}> ({
^bb0(%h: !rngd.buffer<hbm, 0>, %w: !rngd.buffer<hbm, 0>, %t: !rngd.buffer<hbm, 0>, %o: !rngd.buffer<hbm, 0>):
  %weight = "rngd.alloc"() <{label = "weight"}> : () -> !rngd.buffer<dm, 4096>
  "rngd.dma"(%w, %weight) <{command = #rngd.command<"dma n=64 run=4096 source(space=hbm base=0 strides=4096) destination(space=dm base=0 strides=4194304)">}> : (!rngd.buffer<hbm, 0>, !rngd.buffer<dm, 4096>) -> ()
  %angle = "rngd.alloc"() <{label = "angle"}> : () -> !rngd.buffer<dm, 4096>
  "rngd.dma"(%t, %angle) <{command = #rngd.command<"dma n=64 run=4096 source(space=hbm base=0 strides=4096) destination(space=dm base=0 strides=4194304)">}> : (!rngd.buffer<hbm, 0>, !rngd.buffer<dm, 4096>) -> ()
  %hidden = "rngd.alloc"() <{label = "hidden"}> : () -> !rngd.buffer<dm, 4096>
  "rngd.dma"(%h, %hidden) <{command = #rngd.command<"dma n=64 run=4096 source(space=hbm base=0 strides=4096) destination(space=dm base=0 strides=4194304)">}> : (!rngd.buffer<hbm, 0>, !rngd.buffer<dm, 4096>) -> ()
  %y = "rngd.alloc"() <{label = "y"}> : () -> !rngd.buffer<dm, 4096>
  "rngd.exec"(%weight, %y) <{command = #rngd.command<"exec context=sub counter(n=512 a=8 commit=8) a(dtype=f32) stream(run=2) commit_port(dtype=f32) commit(columns=2 column_stride=4)">, operandSegmentSizes = array<i32: 1, 0, 0, 0, 1>}> : (!rngd.buffer<dm, 4096>, !rngd.buffer<dm, 4096>) -> ()
  "rngd.exec"(%angle, %y) <{command = #rngd.command<"exec context=sub counter(n=512 a=8 commit=8) a(dtype=f32) stream(run=2) commit_port(dtype=f32) commit(columns=2 column_stride=4)">, operandSegmentSizes = array<i32: 1, 0, 0, 0, 1>}> : (!rngd.buffer<dm, 4096>, !rngd.buffer<dm, 4096>) -> ()
  "rngd.exec"(%hidden, %y) <{command = #rngd.command<"exec context=sub counter(n=512 a=8 commit=8) a(dtype=f32) stream(run=2) commit_port(dtype=f32) commit(columns=2 column_stride=4)">, operandSegmentSizes = array<i32: 1, 0, 0, 0, 1>}> : (!rngd.buffer<dm, 4096>, !rngd.buffer<dm, 4096>) -> ()
  "rngd.dma"(%y, %o) <{command = #rngd.command<"dma n=64 run=4096 source(space=dm base=0 strides=4194304) destination(space=hbm base=0 strides=4096)">}> : (!rngd.buffer<dm, 4096>, !rngd.buffer<hbm, 0>) -> ()
}) : () -> ()
"rngd.call"(%table, %h0) <{callee = @first}> : (!rngd.buffer<hbm, 0>, !rngd.buffer<hbm, 0>) -> ()
"rngd.call"(%h0, %w0, %table, %h1) <{callee = @layer}> : (!rngd.buffer<hbm, 0>, !rngd.buffer<hbm, 0>, !rngd.buffer<hbm, 0>, !rngd.buffer<hbm, 0>) -> ()
"rngd.call"(%h1, %w1, %table, %h0) <{callee = @layer}> : (!rngd.buffer<hbm, 0>, !rngd.buffer<hbm, 0>, !rngd.buffer<hbm, 0>, !rngd.buffer<hbm, 0>) -> ()
// CHECK:      sym_name = "first"
// CHECK:      "rngd.dma"(%0, {{.*}}for_successor
// CHECK:      "rngd.dma"(%1, {{.*}}for_successor
// CHECK:      sym_name = "layer"
// CHECK:      label = "weight", resident
// CHECK:      label = "angle", resident
// CHECK:      "rngd.dma"(%y, %o)
// CHECK-NEXT: "rngd.dma"(%0, %weight) {{.*}}for_successor
// CHECK-NEXT: })
// CHECK:      sym_name = "layer_alone"
// CHECK-NOT:  for_successor
// CHECK:      "rngd.call"(%table, %h0, %w0, %table) <{callee = @first}>
// CHECK-NEXT: "rngd.call"(%h0, %w0, %table, %h1, %w1) <{callee = @layer}>
// CHECK-NEXT: "rngd.call"(%h1, %w1, %table, %h0) <{callee = @layer_alone}>

// -----

// What commands write must not be read before its time: only the table is taken over.
%h0 = "rngd.region"() <{region_name = "h0", content = {scratch_bytes = 262144 : i64}}> : () -> !rngd.buffer<hbm, 0>
%h1 = "rngd.region"() <{region_name = "h1", content = {scratch_bytes = 262144 : i64}}> : () -> !rngd.buffer<hbm, 0>
%table = "rngd.region"() <{region_name = "table", content = {derived = {}}}> : () -> !rngd.buffer<hbm, 0>
%w0 = "rngd.region"() <{region_name = "w0", content = {scratch_bytes = 262144 : i64}}> : () -> !rngd.buffer<hbm, 0>
%w1 = "rngd.region"() <{region_name = "w1", content = {scratch_bytes = 262144 : i64}}> : () -> !rngd.buffer<hbm, 0>
"rngd.block"() <{sym_name = "first"}> ({
^bb0(%h: !rngd.buffer<hbm, 0>, %o: !rngd.buffer<hbm, 0>):
  %x = "rngd.alloc"() <{label = "x"}> : () -> !rngd.buffer<dm, 4096>
  "rngd.dma"(%h, %x) <{command = #rngd.command<"dma n=64 run=4096 source(space=hbm base=0 strides=4096) destination(space=dm base=0 strides=4194304)">}> : (!rngd.buffer<hbm, 0>, !rngd.buffer<dm, 4096>) -> ()
  %y = "rngd.alloc"() <{label = "y"}> : () -> !rngd.buffer<dm, 4096>
  "rngd.exec"(%x, %y) <{command = #rngd.command<"exec context=sub counter(n=512 a=8 commit=8) a(dtype=f32) stream(run=2) commit_port(dtype=f32) commit(columns=2 column_stride=4)">, operandSegmentSizes = array<i32: 1, 0, 0, 0, 1>}> : (!rngd.buffer<dm, 4096>, !rngd.buffer<dm, 4096>) -> ()
  "rngd.dma"(%y, %o) <{command = #rngd.command<"dma n=64 run=4096 source(space=dm base=0 strides=4194304) destination(space=hbm base=0 strides=4096)">}> : (!rngd.buffer<dm, 4096>, !rngd.buffer<hbm, 0>) -> ()
}) : () -> ()
"rngd.block"() <{sym_name = "layer"}> ({
^bb0(%h: !rngd.buffer<hbm, 0>, %w: !rngd.buffer<hbm, 0>, %t: !rngd.buffer<hbm, 0>, %o: !rngd.buffer<hbm, 0>):
  %weight = "rngd.alloc"() <{label = "weight"}> : () -> !rngd.buffer<dm, 4096>
  "rngd.dma"(%w, %weight) <{command = #rngd.command<"dma n=64 run=4096 source(space=hbm base=0 strides=4096) destination(space=dm base=0 strides=4194304)">}> : (!rngd.buffer<hbm, 0>, !rngd.buffer<dm, 4096>) -> ()
  %angle = "rngd.alloc"() <{label = "angle"}> : () -> !rngd.buffer<dm, 4096>
  "rngd.dma"(%t, %angle) <{command = #rngd.command<"dma n=64 run=4096 source(space=hbm base=0 strides=4096) destination(space=dm base=0 strides=4194304)">}> : (!rngd.buffer<hbm, 0>, !rngd.buffer<dm, 4096>) -> ()
  %hidden = "rngd.alloc"() <{label = "hidden"}> : () -> !rngd.buffer<dm, 4096>
  "rngd.dma"(%h, %hidden) <{command = #rngd.command<"dma n=64 run=4096 source(space=hbm base=0 strides=4096) destination(space=dm base=0 strides=4194304)">}> : (!rngd.buffer<hbm, 0>, !rngd.buffer<dm, 4096>) -> ()
  %y = "rngd.alloc"() <{label = "y"}> : () -> !rngd.buffer<dm, 4096>
  "rngd.exec"(%weight, %y) <{command = #rngd.command<"exec context=sub counter(n=512 a=8 commit=8) a(dtype=f32) stream(run=2) commit_port(dtype=f32) commit(columns=2 column_stride=4)">, operandSegmentSizes = array<i32: 1, 0, 0, 0, 1>}> : (!rngd.buffer<dm, 4096>, !rngd.buffer<dm, 4096>) -> ()
  "rngd.exec"(%angle, %y) <{command = #rngd.command<"exec context=sub counter(n=512 a=8 commit=8) a(dtype=f32) stream(run=2) commit_port(dtype=f32) commit(columns=2 column_stride=4)">, operandSegmentSizes = array<i32: 1, 0, 0, 0, 1>}> : (!rngd.buffer<dm, 4096>, !rngd.buffer<dm, 4096>) -> ()
  "rngd.exec"(%hidden, %y) <{command = #rngd.command<"exec context=sub counter(n=512 a=8 commit=8) a(dtype=f32) stream(run=2) commit_port(dtype=f32) commit(columns=2 column_stride=4)">, operandSegmentSizes = array<i32: 1, 0, 0, 0, 1>}> : (!rngd.buffer<dm, 4096>, !rngd.buffer<dm, 4096>) -> ()
  "rngd.dma"(%y, %o) <{command = #rngd.command<"dma n=64 run=4096 source(space=dm base=0 strides=4194304) destination(space=hbm base=0 strides=4096)">}> : (!rngd.buffer<dm, 4096>, !rngd.buffer<hbm, 0>) -> ()
}) : () -> ()
"rngd.call"(%table, %h0) <{callee = @first}> : (!rngd.buffer<hbm, 0>, !rngd.buffer<hbm, 0>) -> ()
"rngd.call"(%h0, %w0, %table, %h1) <{callee = @layer}> : (!rngd.buffer<hbm, 0>, !rngd.buffer<hbm, 0>, !rngd.buffer<hbm, 0>, !rngd.buffer<hbm, 0>) -> ()
"rngd.call"(%h1, %w1, %table, %h0) <{callee = @layer}> : (!rngd.buffer<hbm, 0>, !rngd.buffer<hbm, 0>, !rngd.buffer<hbm, 0>, !rngd.buffer<hbm, 0>) -> ()
// CHECK-NOT:  "weight", resident
// CHECK:      label = "angle", resident, address
// CHECK-NOT:  "weight", resident
// CHECK:      "rngd.call"(%h0, %w0, %table, %h1) <{callee = @layer}>
