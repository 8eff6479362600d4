// RUN: furiosa-llm opt %s --passes "shard-tensor-parallel{tp=2}" --split-input-file | filecheck %s
// RUN: furiosa-llm opt %s --passes "shard-tensor-parallel{tp=2 partial-sum=bf16}" --split-input-file | filecheck %s --check-prefix BF16
// RUN: furiosa-llm opt %s --passes "shard-tensor-parallel{tp=1}" --split-input-file | filecheck %s --check-prefix ONE

// The first product gives its rows, 3 and 2 of 5; the second takes its columns, and the ranks add
// up. The bias of the first is cut like its rows, that of the second is on one rank.
nn.parameter @up : tensor<5x4xbf16>
nn.parameter @up.bias : tensor<5xbf16>
nn.parameter @down : tensor<4x5xbf16>
nn.parameter @down.bias : tensor<4xbf16>
nn.parameter @norm : tensor<4xbf16>
func.func @forward(%x: tensor<2x4xbf16>) -> tensor<2x4xbf16> {
  %up = nn.get_parameter @up : tensor<5x4xbf16>
  %b = nn.get_parameter @up.bias : tensor<5xbf16>
  %down = nn.get_parameter @down : tensor<4x5xbf16>
  %c = nn.get_parameter @down.bias : tensor<4xbf16>
  %norm = nn.get_parameter @norm : tensor<4xbf16>
  %n = nn.rms_norm %x, %norm eps 1.0e-05 : tensor<2x4xbf16>, tensor<4xbf16> -> tensor<2x4xbf16>
  %h = nn.linear %n, %up bias %b : tensor<2x4xbf16>, tensor<5x4xbf16> bias tensor<5xbf16> -> tensor<2x5xbf16>
  %s = nn.silu %h : tensor<2x5xbf16>
  %y = nn.linear %s, %down bias %c : tensor<2x5xbf16>, tensor<4x5xbf16> bias tensor<4xbf16> -> tensor<2x4xbf16> loc("mlp.down"("n"))
  func.return %y : tensor<2x4xbf16>
}
// CHECK:      builtin.module attributes {dist.mesh = #dist.mesh<2, 1>} {
// CHECK:      func.func @forward(%x: tensor<2x4xbf16> {{.*}}) -> tensor<2x4xbf16> attributes {dist.argument_cuts = [unit], dist.result_cuts = [unit]} {
// CHECK-NEXT:   [[UP:%.*]] = dist.get_shard @up cut <0, 3, {{\[\[}}0:3], [3:5]]> {dist.why = "rows, because mlp.down takes its input in parts"} : tensor<3x4xbf16>
// CHECK-NEXT:   [[B:%.*]] = dist.get_shard @up.bias cut <0, 3, {{\[\[}}0:3], [3:5]]> {{.*}} : tensor<3xbf16>
// CHECK-NEXT:   [[DOWN:%.*]] = dist.get_shard @down cut <1, 3, {{\[\[}}0:3], [3:5]]> {dist.why = "columns, as its input comes; ranks add their sums"} : tensor<4x3xbf16>
// CHECK-NEXT:   [[C:%.*]] = dist.get_shard @down.bias cut <0, 4, {{\[\[}}0:4], [-]]> {dist.why = "on one rank, so that the sum over the ranks has it once"} : tensor<4xbf16>
// CHECK-NEXT:   %norm = nn.get_parameter @norm
// CHECK-NEXT:   %n = nn.rms_norm %x, %norm
// CHECK-NEXT:   %h = nn.linear %n, [[UP]] bias [[B]] : {{.*}} -> tensor<2x3xbf16>
// CHECK-NEXT:   %s = nn.silu %h : tensor<2x3xbf16>
// CHECK-NEXT:   %y = nn.linear %s, [[DOWN]] bias [[C]] : {{.*}} -> tensor<2x4xf32> loc("mlp.down"("n"))
// CHECK-NEXT:   [[SUM:%.*]] = dist.all_reduce %y mask 1 : tensor<2x4xf32> -> tensor<2x4xbf16> loc("mlp.down"("n"))
// CHECK-NEXT:   func.return [[SUM]] : tensor<2x4xbf16>

// BF16:         dist.all_reduce %y mask 1 : tensor<2x4xbf16> -> tensor<2x4xbf16>

// ONE-NOT:    dist.
// ONE:        %y = nn.linear %s, %down bias %c
// ONE-NOT:    dist.

// -----

// What needs whole rows gets them: a norm over the features that a product made.
nn.parameter @w : tensor<4x4xf32>
nn.parameter @norm : tensor<4xf32>
func.func @forward(%x: tensor<2x4xf32>) -> tensor<2x1xf32> {
  %w = nn.get_parameter @w : tensor<4x4xf32>
  %norm = nn.get_parameter @norm : tensor<4xf32>
  %h = nn.linear %x, %w : tensor<2x4xf32>, tensor<4x4xf32> -> tensor<2x4xf32>
  %n = nn.rms_norm %h, %norm eps 1.0e-05 : tensor<2x4xf32>, tensor<4xf32> -> tensor<2x4xf32>
  %m = nn.mean %n dims [1] keepdim : tensor<2x4xf32> -> tensor<2x1xf32>
  func.return %m : tensor<2x1xf32>
}
// CHECK:      %h = nn.linear %x, {{.*}} -> tensor<2x2xf32>
// CHECK-NEXT: [[H:%.*]] = dist.all_gather %h cut <1, 2, {{\[\[}}0:2], [2:4]]> : tensor<2x2xf32> -> tensor<2x4xf32>
// CHECK-NEXT: %n = nn.rms_norm [[H]], %norm

// -----

// 1 / 0 is not a number that a weight of zero takes out of a sum: a tensor with padding is
// gathered before its columns meet weights.
nn.parameter @up : tensor<3x4xf32>
nn.parameter @down : tensor<4x3xf32>
func.func @forward(%x: tensor<2x4xf32>) -> tensor<2x4xf32> {
  %up = nn.get_parameter @up : tensor<3x4xf32>
  %down = nn.get_parameter @down : tensor<4x3xf32>
  %h = nn.linear %x, %up : tensor<2x4xf32>, tensor<3x4xf32> -> tensor<2x3xf32>
  %r = nn.rsqrt %h : tensor<2x3xf32>
  %y = nn.linear %r, %down : tensor<2x3xf32>, tensor<4x3xf32> -> tensor<2x4xf32>
  func.return %y : tensor<2x4xf32>
}
// CHECK:      func.func @forward({{.*}}) -> tensor<2x2xf32> attributes {dist.argument_cuts = [unit], dist.result_cuts = [#dist.cut<1, 2, {{\[\[}}0:2], [2:4]]>]}
// CHECK:      dist.all_gather
// CHECK-NOT:  dist.all_reduce

// -----

// What is whole anyway is cut on the spot for attention, and stays whole for others.
func.func @forward(%x: tensor<1x2x3x4xf32>) -> (tensor<1x3x2x4xf32>, tensor<1x1x3x4xf32>) {
  %n = nn.neg %x : tensor<1x2x3x4xf32>
  %y = nn.attention %n, %n, %n scale 1.0 causal : tensor<1x2x3x4xf32>, tensor<1x2x3x4xf32>, tensor<1x2x3x4xf32> -> tensor<1x3x2x4xf32>
  %m = nn.mean %n dims [1] keepdim : tensor<1x2x3x4xf32> -> tensor<1x1x3x4xf32>
  func.return %y, %m : tensor<1x3x2x4xf32>, tensor<1x1x3x4xf32>
}
// CHECK:      %n = nn.neg %x : tensor<1x2x3x4xf32>
// CHECK-NEXT: [[HEADS:%.*]] = dist.shard %n cut <1, 1, {{\[\[}}0:1], [1:2]]> : tensor<1x2x3x4xf32> -> tensor<1x1x3x4xf32>
// CHECK-NEXT: %y = nn.attention [[HEADS]], [[HEADS]], [[HEADS]] {{.*}} -> tensor<1x3x1x4xf32>
// CHECK-NEXT: %m = nn.mean %n dims [1] keepdim
// CHECK-NEXT: func.return %y, %m

// -----

// Blocks of 4 rows and 4 columns that a boundary at 6 cuts: each rank has blocks of 2, and their
// scales as often as they are needed. A scale of one block stays whole.
nn.parameter @up : tensor<12x4xf8E4M3FN>
nn.parameter @up.scale : tensor<3x1xbf16>
nn.parameter @down : tensor<4x12xf8E4M3FN>
nn.parameter @down.scale : tensor<1x1x3x1xbf16>
func.func @forward(%x: tensor<2x4xbf16>) -> tensor<2x4xbf16> {
  %up = nn.get_parameter @up : tensor<12x4xf8E4M3FN>
  %us = nn.get_parameter @up.scale : tensor<3x1xbf16>
  %down = nn.get_parameter @down : tensor<4x12xf8E4M3FN>
  %ds = nn.get_parameter @down.scale : tensor<1x1x3x1xbf16>
  %h = quant.linear %x, %up by %us block 4, 4 : tensor<2x4xbf16>, tensor<12x4xf8E4M3FN> by tensor<3x1xbf16> -> tensor<2x12xbf16>
  %m = quant.dynamic_scale %h group 12 : tensor<2x12xbf16> -> tensor<2x1xf32>
  %q = quant.quantize %h by %m : tensor<2x12xbf16>, tensor<2x1xf32> -> tensor<2x12xf8E4M3FN>
  %y = quant.linear %q, %down by %ds block 4, 4 x_scale %m : tensor<2x12xf8E4M3FN>, tensor<4x12xf8E4M3FN> by tensor<1x1x3x1xbf16> x_scale tensor<2x1xf32> -> tensor<2x4xbf16> loc("mlp.down"("n"))
  func.return %y : tensor<2x4xbf16>
}
// CHECK:      dist.get_shard @up cut <0, 6, {{\[\[}}0:6], [6:12]]>
// CHECK-NEXT: [[US:%.*]] = dist.get_shard @up.scale cut <0, 1, {{\[\[}}0:1, 0:1, 1:2], [1:2, 2:3, 2:3]]> {dist.why = "scales of the weight's rows: in blocks of 2, as ranks begin inside its 4"} : tensor<3x1xbf16>
// CHECK:      dist.get_shard @down cut <1, 6, {{\[\[}}0:6], [6:12]]>
// CHECK-NEXT: [[DS:%.*]] = dist.get_shard @down.scale cut <2, 1, {{\[\[}}0:1, 0:1, 1:2], [1:2, 2:3, 2:3]]> {{.*}} : tensor<1x1x3x1xbf16>
// CHECK-NEXT: %h = quant.linear %x, {{.*}} by [[US]] block 2, 4 : {{.*}} -> tensor<2x6xbf16>
// CHECK-NEXT: %m = quant.dynamic_scale %h group 6 : tensor<2x6xbf16> -> tensor<2x1xf32>
// CHECK-NEXT: [[MAX:%.*]] = dist.all_reduce %m mask 1 kind "max" : tensor<2x1xf32> -> tensor<2x1xf32>
// CHECK-NEXT: %q = quant.quantize %h by [[MAX]]
// CHECK-NEXT: %y = quant.linear %q, {{.*}} by [[DS]] block 4, 2 x_scale [[MAX]] : {{.*}} -> tensor<2x4xf32>
// CHECK-NEXT: dist.all_reduce %y mask 1 : tensor<2x4xf32> -> tensor<2x4xbf16>

// -----

// The sigmoid of padding is 0.5, which could be the largest: the token is measured whole.
nn.parameter @up : tensor<5x4xbf16>
nn.parameter @down : tensor<4x5xf8E4M3FN>
nn.parameter @down.scale : tensor<4x1xf32>
func.func @forward(%x: tensor<2x4xbf16>) -> tensor<2x4xbf16> {
  %up = nn.get_parameter @up : tensor<5x4xbf16>
  %down = nn.get_parameter @down : tensor<4x5xf8E4M3FN>
  %ds = nn.get_parameter @down.scale : tensor<4x1xf32>
  %h = nn.linear %x, %up : tensor<2x4xbf16>, tensor<5x4xbf16> -> tensor<2x5xbf16>
  %s = nn.sigmoid %h : tensor<2x5xbf16>
  %m = quant.dynamic_scale %s group 5 : tensor<2x5xbf16> -> tensor<2x1xf32>
  %q = quant.quantize %s by %m : tensor<2x5xbf16>, tensor<2x1xf32> -> tensor<2x5xf8E4M3FN>
  %y = quant.linear %q, %down by %ds block 1, 5 x_scale %m : tensor<2x5xf8E4M3FN>, tensor<4x5xf8E4M3FN> by tensor<4x1xf32> x_scale tensor<2x1xf32> -> tensor<2x4xbf16>
  func.return %y : tensor<2x4xbf16>
}
// CHECK:      [[S:%.*]] = dist.all_gather %s
// CHECK-NEXT: %m = quant.dynamic_scale [[S]] group 5
// CHECK-NEXT: %q = quant.quantize %s by %m : tensor<2x3xbf16>
// CHECK-NEXT: quant.linear %q, {{.*}} block 1, 3 x_scale %m
